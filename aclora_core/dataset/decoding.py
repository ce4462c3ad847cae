"""Decoding: an image file of any supported format becomes upright RGB on white."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .image import CaptionedImage

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "AVIF")  # never EPS and the like, which start programs
MAX_PIXELS = 178_956_970  # Pillow's own limit, above which it assumes a decompression bomb
_STRIP_HEIGHT = 512  # rows
_ORIENTATION = 0x0112  # EXIF tag; the values 5 to 8 swap width and height


def upright_size(path: Path, name: str) -> tuple[int, int]:
    """Return the (width, height) of an image after EXIF rotation, from its header alone.

    Args:
        path: the image file.
        name: what error messages call it.

    Raises:
        ValueError: the header cannot be read.
    """
    with _open_image(path, name) as image:
        # The PNG reader's own getexif decodes the whole image to look behind it; the header is enough here.
        # For TIFF files Pillow already reports the upright size.
        rotated = image.format != "TIFF" and Image.Image.getexif(image).get(_ORIENTATION, 1) in (5, 6, 7, 8)
        width, height = image.size
    return (height, width) if rotated else (width, height)


def read_rgb(path: Path, name: str, bucket: tuple[int, int]) -> Image.Image:
    """Read an image as upright RGB on white, scaled with Lanczos to cover a bucket and cropped evenly.

    Args:
        path: the image file.
        name: what error messages call it.
        bucket: (width, height) of the result in pixels.

    Raises:
        ValueError: the file cannot be decoded.
    """
    with _open_image(path, name) as image:
        # JPEG can be decoded at 1/2, 1/4 or 1/8 at next to no cost; twice the bucket keeps the detail Lanczos needs.
        image.draft(None, (2 * max(bucket), 2 * max(bucket)))
        ImageOps.exif_transpose(image, in_place=True)  # the other form also copies images that are upright already
        return ImageOps.fit(_flatten(image, "white"), bucket, Image.Resampling.LANCZOS)


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
    with _open_image(path, name) as image:
        if alpha and not image.has_transparency_data:
            return None
        image.draft(None, (2 * max(bucket), 2 * max(bucket)))
        ImageOps.exif_transpose(image, in_place=True)
        if alpha:
            grey = image.convert("RGBA").getchannel("A")
            if grey.getextrema() == (255, 255):
                return None
        else:
            grey = _flatten(image, "black").convert("L")
        return ImageOps.fit(grey, bucket, Image.Resampling.BOX)


def upscale_factor(image: CaptionedImage, bucket: tuple[int, int]) -> float:
    """Return the factor by which `load_image` scales an image to cover the bucket; above 1 it is enlarged."""
    return max(bucket[0] / image.width, bucket[1] / image.height)


def cropped_fraction(image: CaptionedImage, bucket: tuple[int, int]) -> float:
    """Return the fraction of the image's area that `load_image` crops to fit the bucket."""
    scale = upscale_factor(image, bucket)
    return 1.0 - (bucket[0] * bucket[1]) / (image.width * image.height * scale * scale)


def load_image(image: CaptionedImage, bucket: tuple[int, int]) -> Tensor:
    """Load an image, upright, on white, scaled to cover the bucket and cropped.

    Returns:
        float32 (height, width, 3) in 0..1.

    Raises:
        ValueError: the file cannot be decoded; the message names it.
    """
    fitted = read_rgb(image.path, image.name, bucket)
    return torch.from_numpy(np.asarray(fitted, dtype=np.float32) / 255.0)


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """The formats that this build of Pillow can open."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextmanager
def _open_image(path: Path, name: str) -> Iterator[Image.Image]:
    """Open an image; any error inside the block becomes a ValueError that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large images and odd EXIF data, both handled here
            with Image.open(path, formats=_formats()) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                yield image
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} was skipped: it has more than {MAX_PIXELS // 1_000_000} megapixels. Make it smaller."
        ) from error
    except Exception as error:  # Pillow raises nearly every type of exception on a damaged file
        raise ValueError(f"{name} was skipped: it cannot be read as an image ({_pillow_reason(error)}).") from error


def _pillow_reason(error: Exception) -> str:
    """Pillow's message without the full path of a private file."""
    if isinstance(error, UnidentifiedImageError):
        return "its content is none of " + ", ".join(_formats())
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _flatten(image: Image.Image, background: str) -> Image.Image:
    """Convert an image of any mode to RGB; transparent parts show the background."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    white_point = _white_point(image)
    flat = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        flat.paste(_flatten_strip(strip, background, white_point), (0, top))
    return flat


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield horizontal strips with their top rows: converting a large image at once takes several times its memory."""
    for top in range(0, image.height, _STRIP_HEIGHT):
        yield top, image.crop((0, top, image.width, min(top + _STRIP_HEIGHT, image.height)))


def _flatten_strip(image: Image.Image, background: str, white_point: float) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        image = _deep_to_grey(image, white_point)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    flat = Image.new("RGB", image.size, background)
    flat.paste(image, mask=image.getchannel("A"))
    return flat


def _white_point(image: Image.Image) -> float:
    """The value of white in deep grey: files do not say, so it is the smallest common one that no value exceeds."""
    if image.mode.startswith("I;16") or not image.mode.startswith(("I", "F")):
        return 65535.0
    maxima = [np.fmax.reduce(np.asarray(strip), axis=None) for _, strip in _strips(image)]
    largest = float(np.fmax.reduce(maxima))
    white = largest
    for common in (1.0, 255.0, 65535.0):
        if largest <= common:
            white = common
            break
    return max(white, 65535.0) if image.mode == "I" else white


def _deep_to_grey(image: Image.Image, white_point: float) -> Image.Image:
    """Convert 16-bit, 32-bit or float grey to 8 bits; Pillow's own conversion would clip instead of scale."""
    values = np.asarray(image).astype(np.float32)
    scaled = np.nan_to_num(values / np.float32(white_point)).clip(0.0, 1.0) * 255.0
    return Image.fromarray(scaled.round().astype(np.uint8))
