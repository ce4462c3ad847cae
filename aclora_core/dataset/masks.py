"""Masks: which files are masks, which image each belongs to, and what they hold.

Follows the conventions of other trainers. OneTrainer puts rocket-masklabel.png beside rocket.png. kohya's scripts,
ai-toolkit and diffusion-pipe take a folder of masks with the images' own names; here it is the subfolder "masks" (or
"mask") of the folder that the images are in.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .decoding import read_mask
from .image import CaptionedImage
from .names import ByName
from .opening import read_header

MASK_ENDING = "-masklabel"
MASK_FOLDERS = frozenset({"masks", "mask"})
_ASPECT_TOLERANCE = 0.03  # how far the aspect ratios of an image and its mask may differ, as a logarithm
_BLACK = 0.02  # a mask that is nowhere brighter is black; lossy formats leave such noise


def is_mask_folder(name: str) -> bool:
    """Return whether a subfolder holds masks."""
    return name.casefold() in MASK_FOLDERS


def is_mask(name: str) -> bool:
    """Return whether a file beside images is a mask."""
    return os.path.splitext(name)[0].casefold().endswith(MASK_ENDING)


def find_masks(
    folder: Path, files: Iterable[str], mask_files: Mapping[str, Iterable[str]], suffixes: Collection[str]
) -> tuple[dict[str, Path], list[Path]]:
    """Match the images of a folder with their masks.

    A mask beside the image takes precedence over one in a subfolder; there, the image's exact name over the same stem
    with another suffix.

    Args:
        folder: the folder of the images.
        files: the names of its files.
        mask_files: the names of the files in each of its subfolders of masks.
        suffixes: of image files, in lower case.

    Returns:
        The mask of each image that has one, by the image's file name, and the masks that belong to no image.
    """
    names = [name for name in files if _is_image(name, suffixes)]
    beside = [folder / name for name in sorted(names) if is_mask(name)]
    inside = [
        folder / subfolder / name
        for subfolder in sorted(mask_files)
        for name in sorted(mask_files[subfolder])
        if _is_image(name, suffixes)
    ]
    # Of several candidates the first in the order of names counts.
    beside_by_stem = ByName((_stem(path.name), path) for path in beside)
    inside_by_name = ByName((path.name, path) for path in inside)
    inside_by_stem = ByName((_stem(path.name), path) for path in inside)
    masks = {}
    for name in names:
        if is_mask(name):
            continue
        stem = _stem(name)
        mask = beside_by_stem.get(stem) or inside_by_name.get(name) or inside_by_stem.get(stem)
        if mask is not None:
            masks[name] = mask
    used = set(masks.values())
    return masks, [path for path in [*beside, *inside] if path not in used]


def _is_image(name: str, suffixes: Collection[str]) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes


def _stem(name: str) -> str:
    """The stem that an image and its mask share."""
    stem = os.path.splitext(name)[0]
    return stem[: -len(MASK_ENDING)] if is_mask(name) else stem


def load_mask(image: CaptionedImage, bucket: tuple[int, int], alpha: bool = False) -> Tensor | None:
    """Load the mask of an image, scaled and cropped as `load_image` does with the image.

    Args:
        image: the image.
        bucket: (width, height) of the result in pixels.
        alpha: whether the alpha channel of an image without a mask file serves as its mask.

    Returns:
        float32 (height, width), 1 where the image is learned and 0 where it is not; None if all of it is learned.

    Raises:
        ValueError: the mask cannot be decoded or has another aspect ratio; the message names the image.
    """
    if image.mask is not None:
        found = _read_mask_file(image, image.mask, bucket)
    elif alpha:
        found = read_mask(image.path, image.name, bucket, alpha=True)
    else:
        found = None
    return None if found is None else torch.from_numpy(np.asarray(found, dtype=np.float32) / 255.0)


def _read_mask_file(image: CaptionedImage, mask: Path, bucket: tuple[int, int]) -> Image.Image | None:
    try:
        width, height, _ = read_header(mask, mask.name)
        found = read_mask(mask, mask.name, bucket)
    except ValueError as error:
        raise ValueError(
            f"The mask {mask.name} of {image.name} cannot be read as an image. Save it again as PNG, or remove it."
        ) from error
    if abs(math.log(width / height * image.height / image.width)) > _ASPECT_TOLERANCE:
        raise ValueError(
            f"The mask of {image.name} is {width} × {height} pixels, but the image is {image.width} × {image.height}. "
            "Give the mask the same aspect ratio, so that it covers the image."
        )
    return found


def at_latent_size(mask: Tensor, latent: Tensor) -> Tensor:
    """Average a mask down to the size of a latent.

    Args:
        mask: (height, width) in 0..1.
        latent: (1, channels, ..., h, w).

    Returns:
        float32 (1, 1, ..., h, w): the mean of the mask over the area that each latent position stands for.
    """
    height, width = latent.shape[-2:]
    small = torch.nn.functional.adaptive_avg_pool2d(mask.float()[None, None], (height, width))
    return small.reshape(1, *(1 for _ in latent.shape[1:-2]), height, width)


def is_black(mask: Tensor, step: int = 1) -> bool:
    """Return whether a mask leaves nothing to learn.

    Args:
        mask: (..., height, width) in 0..1, with a single mask in it.
        step: pixels per side of a latent position, over which the mask is averaged first.
    """
    flat = mask.float().reshape(1, 1, *mask.shape[-2:])
    return float(torch.nn.functional.avg_pool2d(flat, step).max()) < _BLACK
