"""Where the mask of a picture lies, after the customs of other trainers, and which files are masks and no pictures.

OneTrainer puts rocket-masklabel.png beside rocket.png. kohya's scripts, ai-toolkit and diffusion-pipe take a folder of
masks with the pictures' own names; here it is the subfolder "masks" (or "mask") of the folder that the pictures are in.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .decoding import read_mask, upright_size
from .image import CaptionedImage

MASK_ENDING = "-masklabel"


MASK_FOLDERS = frozenset({"masks", "mask"})


def is_mask_folder(name: str) -> bool:
    """Whether a subfolder holds masks."""
    return name.casefold() in MASK_FOLDERS


def is_mask(name: str) -> bool:
    """Whether a file beside pictures is a mask."""
    return os.path.splitext(name)[0].casefold().endswith(MASK_ENDING)


def find_masks(
    folder: Path, files: Iterable[str], subfolders: Iterable[str], suffixes: Collection[str]
) -> tuple[dict[str, Path], list[Path]]:
    """The mask of each picture of a folder that has one, by the picture's file name, and masks without a picture.

    A file beside the picture goes before one in a subfolder, and there the very same name before another ending.
    suffixes: of files that are pictures, in small letters. Raises OSError when a folder cannot be read.
    """
    named = [name for name in files if _is_picture(name, suffixes)]
    beside = [folder / name for name in sorted(named) if is_mask(name)]
    inside = [
        folder / subfolder / name
        for subfolder in sorted(filter(is_mask_folder, subfolders))
        for name in sorted(os.listdir(folder / subfolder))
        if _is_picture(name, suffixes)
    ]
    of_stem = {_stem(path.name): path for path in reversed(beside)}
    of_name = {path.name: path for path in reversed(inside)}
    of_stem_inside = {_stem(path.name): path for path in reversed(inside)}
    masks = {}
    for name in named:
        found = of_stem.get(_stem(name)) or of_name.get(name) or of_stem_inside.get(_stem(name))
        if found and not is_mask(name):
            masks[name] = found
    return masks, [path for path in [*beside, *inside] if path not in masks.values()]


def _is_picture(name: str, suffixes: Collection[str]) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes


def _stem(name: str) -> str:
    """Of a picture or its mask, without the mask's ending."""
    stem = os.path.splitext(name)[0]
    return stem[: -len(MASK_ENDING)] if is_mask(name) else stem


_SAME_SHAPE = 0.03  # of a picture and its mask: how far their ratios of sides may be apart


def load_mask(picture: CaptionedImage, bucket: tuple[int, int], alpha: bool = False) -> Tensor | None:
    """What of a picture is learned, float32 (height, width) in 0..1, cropped and scaled as `load` does; None: all.

    alpha: a picture without a mask of its own has what is not transparent in it.

    Raises ValueError naming the picture when its mask is broken or has another shape.
    """
    if picture.mask is None:
        found = read_mask(picture.path, picture.name, bucket, alpha=True) if alpha else None
    else:
        found = _mask_from_file(picture, picture.mask, bucket)
    return None if found is None else torch.from_numpy(np.asarray(found, dtype=np.float32) / 255.0)


def _mask_from_file(picture: CaptionedImage, mask: Path, bucket: tuple[int, int]) -> Image.Image | None:
    try:
        width, height = upright_size(mask, mask.name)
        found = read_mask(mask, mask.name, bucket)
    except ValueError as error:
        raise ValueError(
            f"The mask {mask.name} of {picture.name} cannot be read as a picture. Save it anew as PNG, or take it away."
        ) from error
    if abs(math.log(width / height * picture.height / picture.width)) > _SAME_SHAPE:
        raise ValueError(
            f"The mask of {picture.name} is {width} × {height} pixels, but the picture {picture.width} × "
            f"{picture.height}. Give it the same shape, so that it lies on the picture."
        )
    return found


_BLACK = 0.02  # a mask that is nowhere brighter has nothing to learn from; files with losses have such dust in black


def at_latent_size(mask: Tensor, latent: Tensor) -> Tensor:
    """A mask (height, width) in 0..1 as float32 (1, 1, ..., h, w) with the sides of a latent (1, channels, ..., h, w).

    Every place of the latent gets the mean of the area that it stands for.
    """
    height, width = latent.shape[-2:]
    small = torch.nn.functional.adaptive_avg_pool2d(mask.float()[None, None], (height, width))
    return small.reshape(1, *(1 for _ in latent.shape[1:-2]), height, width)


def is_black(mask: Tensor, step: int = 1) -> bool:
    """Whether nothing would be learned of a picture with this mask, (..., height, width), in means of step × step."""
    flat = mask.float().reshape(1, 1, *mask.shape[-2:])
    return float(torch.nn.functional.avg_pool2d(flat, step).max()) < _BLACK
