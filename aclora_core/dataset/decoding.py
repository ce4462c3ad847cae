"""Decoding: an image file of any supported format becomes upright sRGB on white."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .color import conversion_to_srgb
from .flattening import alpha_channel, flatten
from .image import CaptionedImage
from .opening import open_image


def read_rgb(path: Path, name: str, bucket: tuple[int, int]) -> Image.Image:
    """Read an image as upright sRGB on white, scaled with Lanczos to cover a bucket and cropped evenly.

    Args:
        path: the image file.
        name: what error messages call it.
        bucket: (width, height) of the result in pixels.

    Raises:
        ValueError: the file cannot be decoded.
    """
    with open_image(path, name) as opened:
        image = opened.decode(bucket)
        flat = flatten(image, "white", conversion_to_srgb(opened.icc_profile, image.mode))
        return ImageOps.fit(opened.upright(flat), bucket, Image.Resampling.LANCZOS)


def read_mask(path: Path, name: str, bucket: tuple[int, int], alpha: bool = False) -> Image.Image | None:
    """Read a mask as upright 8-bit grey, box-filtered to cover a bucket and cropped as `read_rgb` crops the image.

    Args:
        path: the mask file, or the image if alpha.
        name: what error messages call it.
        bucket: (width, height) of the result in pixels.
        alpha: whether the alpha channel is the mask. Otherwise transparent parts are black.

    Returns:
        The mask; None if alpha and nothing is transparent.

    Raises:
        ValueError: the file cannot be decoded.
    """
    with open_image(path, name) as opened:
        if alpha and not opened.image.has_transparency_data:
            return None
        image = opened.decode(bucket)
        # Without the colour profile: a mask holds numbers, not colours.
        grey = alpha_channel(image) if alpha else flatten(image, "black").convert("L")
        if alpha and grey.getextrema() == (255, 255):
            return None
        return ImageOps.fit(opened.upright(grey), bucket, Image.Resampling.BOX)


def upscale_factor(image: CaptionedImage, bucket: tuple[int, int]) -> float:
    """Return the factor by which `load_image` scales an image to cover the bucket; above 1 it is enlarged."""
    return max(bucket[0] / image.width, bucket[1] / image.height)


def cropped_fraction(image: CaptionedImage, bucket: tuple[int, int]) -> float:
    """Return the fraction of the image's area that `load_image` crops to fit the bucket."""
    scale = upscale_factor(image, bucket)
    return 1.0 - (bucket[0] * bucket[1]) / (image.width * image.height * scale * scale)


def load_image(image: CaptionedImage, bucket: tuple[int, int]) -> Tensor:
    """Load an image, upright, in sRGB on white, scaled to cover the bucket and cropped.

    Returns:
        float32 (height, width, 3) in 0..1.

    Raises:
        ValueError: the file cannot be decoded; the message names it.
    """
    fitted = read_rgb(image.path, image.name, bucket)
    return torch.from_numpy(np.asarray(fitted, dtype=np.float32) / 255.0)
