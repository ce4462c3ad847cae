"""One picture file, of any kind that Pillow reads, becomes upright RGB on white. Errors name the file."""

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


MAX_PIXELS = 178_956_970  # where Pillow, too, takes a picture for an attack


_STRIP = 512  # rows


_ORIENTATION = 0x0112  # EXIF tag; 5 to 8 swap width and height


def upright_size(path: Path, name: str) -> tuple[int, int]:
    """Width and height after EXIF rotation, from the header alone. Raises ValueError that calls the file `name`."""
    with _opened(path, name) as image:
        # The PNG reader's own getexif decodes the whole picture to look behind it; the header is enough here.
        # Of TIFF files Pillow gives the upright size already.
        turned = image.format != "TIFF" and Image.Image.getexif(image).get(_ORIENTATION, 1) in (5, 6, 7, 8)
        width, height = image.size
    return (height, width) if turned else (width, height)


def read_rgb(path: Path, name: str, bucket: tuple[int, int]) -> Image.Image:
    """The picture as RGB, upright, on white, scaled with Lanczos to cover bucket = (width, height), cropped evenly.

    Raises ValueError that calls the file `name` when its content is broken.
    """
    with _opened(path, name) as image:
        # JPEG can be decoded at 1/2, 1/4 or 1/8 for next to nothing; twice the bucket keeps the detail Lanczos needs.
        image.draft(None, (2 * max(bucket), 2 * max(bucket)))
        ImageOps.exif_transpose(image, in_place=True)  # the other form copies a picture that stands upright, too
        return ImageOps.fit(_flattened(image, "white"), bucket, Image.Resampling.LANCZOS)


def read_mask(path: Path, name: str, bucket: tuple[int, int], alpha: bool = False) -> Image.Image | None:
    """A mask as grey, 0 to 255, upright, scaled by mean areas and cropped as read_rgb does with the picture.

    alpha: of a picture, how far it is not transparent; None where it is nowhere. Else the file is the mask, and what is
    transparent in it is black. Raises ValueError that calls the file `name` when its content is broken.
    """
    with _opened(path, name) as image:
        if alpha and not image.has_transparency_data:
            return None
        image.draft(None, (2 * max(bucket), 2 * max(bucket)))
        ImageOps.exif_transpose(image, in_place=True)
        if alpha:
            grey = image.convert("RGBA").getchannel("A")
            if grey.getextrema() == (255, 255):
                return None
        else:
            grey = _flattened(image, "black").convert("L")
        return ImageOps.fit(grey, bucket, Image.Resampling.BOX)


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextmanager
def _opened(path: Path, name: str) -> Iterator[Image.Image]:
    """Open a picture; whatever goes wrong with it inside the block becomes a ValueError that names it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures and odd EXIF, which are dealt with here
            with Image.open(path, formats=_formats()) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                yield image
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} was left out: it has more than {MAX_PIXELS // 1_000_000} megapixels. Make it smaller."
        ) from error
    except Exception as error:  # Pillow raises nearly every kind on a damaged file
        raise ValueError(f"{name} was left out: it cannot be read as a picture ({_reason(error)}).") from error


def _reason(error: Exception) -> str:
    """What Pillow says, without the full path of a private file."""
    if isinstance(error, UnidentifiedImageError):
        return "its content is none of " + ", ".join(_formats())
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _flattened(image: Image.Image, paper: str) -> Image.Image:
    """Any mode -> RGB; what is transparent becomes paper."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    white_point = _white_point(image)
    whole = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        whole.paste(_flattened_strip(strip, paper, white_point), (0, top))
    return whole


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The picture in strips with their upper edges: large ones would take several times their size on the way."""
    for top in range(0, image.height, _STRIP):
        yield top, image.crop((0, top, image.width, min(top + _STRIP, image.height)))


def _flattened_strip(image: Image.Image, paper: str, white_point: float) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        image = _deep_to_grey(image, white_point)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    flat = Image.new("RGB", image.size, paper)
    flat.paste(image, mask=image.getchannel("A"))
    return flat


def _white_point(image: Image.Image) -> float:
    """Of deep grey. The file does not say it; the smallest usual one that holds the values is taken."""
    if image.mode.startswith("I;16") or not image.mode.startswith(("I", "F")):
        return 65535.0
    top = float(np.fmax.reduce([np.fmax.reduce(np.asarray(strip), axis=None) for _, strip in _strips(image)]))
    white = next((v for v in (1.0, 255.0, 65535.0) if top <= v), top)
    return max(white, 65535.0) if image.mode == "I" else white


def _deep_to_grey(image: Image.Image, white_point: float) -> Image.Image:
    """16-bit, 32-bit and float grey -> 8 bits; Pillow's own conversion would clip instead of scale."""
    values = np.asarray(image).astype(np.float32)
    scaled = np.nan_to_num(values / np.float32(white_point)).clip(0.0, 1.0) * 255.0
    return Image.fromarray(scaled.round().astype(np.uint8))


def upscale_factor(picture: CaptionedImage, bucket: tuple[int, int]) -> float:
    """The factor by which `load` scales a picture to cover the bucket; above 1 it is drawn larger than it is."""
    return max(bucket[0] / picture.width, bucket[1] / picture.height)


def cropped_fraction(picture: CaptionedImage, bucket: tuple[int, int]) -> float:
    """The share of the picture's area, 0 to 1, that `load` cuts off to fit the bucket."""
    scale = upscale_factor(picture, bucket)
    return 1.0 - (bucket[0] * bucket[1]) / (picture.width * picture.height * scale * scale)


def load_image(picture: CaptionedImage, bucket: tuple[int, int]) -> Tensor:
    """The picture as float32 (height, width, 3) in 0..1, upright, on white, scaled to cover the bucket and cropped.

    Raises ValueError naming the file when its content is broken.
    """
    fitted = read_rgb(picture.path, picture.name, bucket)
    return torch.from_numpy(np.asarray(fitted, dtype=np.float32) / 255.0)
