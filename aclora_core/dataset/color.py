"""Colour profiles: an image with an embedded ICC profile becomes sRGB, as image viewers show it."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

_GREY_MODES = ("1", "L", "LA", "La", "I", "F")  # and those of 16 bits
_DARKEST_WHITE = 192  # of 255; white is white in every profile, so one that makes it darker is damaged
_TOLERANCE = 2  # of 255; a profile that moves no colour further is sRGB itself, and rounding would only add noise


@dataclass(frozen=True)
class ColorConversion:
    """The way from the colours of an embedded profile to sRGB."""

    mode: str  # Pillow's mode of the pixels that it takes
    apply: Callable[[Image.Image], Image.Image]  # from this mode to RGB


def conversion_to_srgb(profile: bytes | None, mode: str) -> ColorConversion | None:
    """Return the conversion from an embedded profile to sRGB.

    Args:
        profile: the ICC profile of the image's file.
        mode: Pillow's mode of the image.

    Returns:
        The conversion; None if there is nothing to convert: no profile, that of sRGB, one that is damaged, or one of
        another kind of colours than the image's.
    """
    if not profile:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        working_mode = _working_mode(source.profile.xcolor_space.strip(), mode)
        if working_mode is None:
            return None
        return _conversion(source, working_mode)
    # What Pillow raises for a damaged profile, and without its colour management.
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, ImportError):
        return None


def _working_mode(space: str, mode: str) -> str | None:
    """The mode in which pixels are converted; grey pixels may have a profile of RGB, but colours none of grey."""
    if mode == "CMYK" or space == "CMYK":
        return "CMYK" if mode == space else None
    if space == "GRAY":
        return "L" if mode in _GREY_MODES or mode.startswith("I;16") else None
    return "RGB" if space == "RGB" and mode != "LAB" else None


def _conversion(source: ImageCms.ImageCmsProfile, mode: str) -> ColorConversion | None:
    transform = ImageCms.buildTransform(source, _srgb(), mode, "RGB")

    def apply(image: Image.Image) -> Image.Image:
        converted = ImageCms.applyTransform(image, transform)
        assert converted is not None  # it is only where the image is changed in place
        return converted

    probe = _probe(mode)
    before = np.asarray(probe.convert("RGB"), dtype=np.int16)
    after = np.asarray(apply(probe), dtype=np.int16)
    is_damaged = after[before.min(-1) == 255].min() < _DARKEST_WHITE
    is_srgb = np.abs(after - before).max() <= _TOLERANCE
    return None if is_damaged or is_srgb else ColorConversion(mode, apply)


@lru_cache(maxsize=1)
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _probe(mode: str) -> Image.Image:
    """An image of many colours of a mode."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    channels = len(mode)
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    grid = np.stack(np.meshgrid(*[levels] * channels, indexing="ij"), -1)
    return Image.frombytes(mode, (9, 9 ** (channels - 1)), grid.tobytes())
