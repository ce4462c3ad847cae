"""Opening an image file: its size, orientation and colour profile, read once for its size and its pixels alike."""

from __future__ import annotations

import importlib
import io
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image

from .png import SIGNATURE, Png, read_png
from .unreadable import reason

# Never EPS and the like, which start programs. The last two need a plugin.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF", "HEIF", "JXL")
MAX_PIXELS = 178_956_970  # Pillow's own limit, above which it assumes a decompression bomb
_ORIENTATION = 0x0112  # EXIF tag
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=[\"']|>)\s*([1-8])")
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WARNING_FILTERS = threading.RLock()  # they belong to the process; a folder may be checked while another loads


class ImageHeader(NamedTuple):
    """What is known of an image before its pixels are decoded."""

    width: int  # pixels, upright
    height: int
    moving: bool  # whether there are further frames or pages, which are not used


class OpenedImage(NamedTuple):
    """An image file whose pixels have not been decoded."""

    image: Image.Image  # as stored, so perhaps not upright
    orientation: int  # EXIF's number from 1 to 8 of what makes it upright; 1 if nothing does
    icc_profile: bytes | None
    moving: bool

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels once upright."""
        width, height = self.image.size
        return (height, width) if self.orientation >= 5 else (width, height)

    def decode(self, size: tuple[int, int]) -> Image.Image:
        """Decode the pixels as they are stored.

        Args:
            size: (width, height) that will be needed; a JPEG is decoded at a fraction of its own where that suffices.
        """
        # 1/2, 1/4 or 1/8 come at next to no cost; twice the size keeps the detail that Lanczos needs.
        self.image.draft(None, (2 * max(size), 2 * max(size)))
        self.image.load()
        return self.image

    def upright(self, pixels: Image.Image) -> Image.Image:
        """Turn pixels from the way they are stored."""
        method = _TRANSPOSE.get(self.orientation)
        return pixels if method is None else pixels.transpose(method)


def read_header(path: Path, name: str) -> ImageHeader:
    """Return an image's size and whether it moves, without decoding it.

    Args:
        path: the image file.
        name: what error messages call it.

    Raises:
        ValueError: the header cannot be read.
    """
    with open_image(path, name) as opened:
        return ImageHeader(*opened.size, opened.moving)


@contextmanager
def open_image(path: Path, name: str) -> Iterator[OpenedImage]:
    """Open an image; any error inside the block becomes a ValueError that names the file.

    Args:
        path: the image file.
        name: what error messages call it.
    """
    try:
        with _ignored_warnings(), open(path, "rb", buffering=0) as file:
            yield _opened(file)
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} was skipped: it has more than {MAX_PIXELS // 1_000_000} megapixels. Make it smaller."
        ) from error
    except Exception as error:  # Pillow raises nearly every type of exception on a damaged file
        raise ValueError(
            f"{name} was skipped: it cannot be read as an image ({reason(error, path, _formats())})."
        ) from error


def _opened(file: io.FileIO) -> OpenedImage:
    is_png = file.read(len(SIGNATURE)) == SIGNATURE
    file.seek(0)
    opened = _opened_png(read_png(file)) if is_png else _opened_by_pillow(io.BufferedReader(file))
    if opened.image.width * opened.image.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    return opened


def _opened_png(png: Png) -> OpenedImage:
    image = Image.open(png.pixels, formats=("PNG",))
    key = image.info.get("transparency")
    if png.deep and isinstance(key, tuple):  # the colour that is transparent, in 16 bits; Pillow's pixels have 8
        image.info["transparency"] = tuple(value >> 8 for value in key)
    return OpenedImage(image, _orientation(png.exif, png.xmp), png.icc_profile, png.moving)


def _opened_by_pillow(file: BinaryIO) -> OpenedImage:
    image = Image.open(file, formats=[name for name in _formats() if name != "PNG"])
    # TIFF files turn by XMP when they are decoded, but not in their size; without it both go by the number below.
    exif, xmp = image.info.get("exif"), image.info.pop("xmp", None)
    orientation = 1 if _turns_itself(image) else _orientation(exif, xmp)
    return OpenedImage(image, orientation, image.info.get("icc_profile"), _is_moving(image))


def _turns_itself(image: Image.Image) -> bool:
    """Whether the decoder makes the image upright, in its size too."""
    if image.format == "TIFF":
        return _ORIENTATION in getattr(image, "tag_v2", {})
    # A JPEG inside a JXL file comes as it was; any other JXL image is turned by its own header, whatever EXIF says.
    return image.format == "HEIF" or (image.format == "JXL" and not getattr(image, "jpeg", False))


def _orientation(exif: bytes | None, xmp: bytes | str | None) -> int:
    """The orientation by EXIF, or else by XMP; 1 if neither says anything that can be understood."""
    found = _exif_orientation(exif) if exif else None
    if found is None and xmp:
        match = _XMP_ORIENTATION.search(xmp.encode() if isinstance(xmp, str) else xmp)
        found = int(match[1]) if match else None
    return found or 1


def _exif_orientation(data: bytes) -> int | None:
    exif = Image.Exif()
    with suppress(Exception):  # damaged EXIF data raises nearly anything; the pixels are not hurt by it
        exif.load(data)
        found = exif.get(_ORIENTATION)
        if isinstance(found, int) and 1 <= found <= 8:
            return found
    return None


def _is_moving(image: Image.Image) -> bool:
    """Whether there are further frames or pages. Those of MPO are other views and depths of one photograph."""
    with suppress(Exception):  # the second frame may be damaged, which does not hurt the first
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    return False


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """The formats that this build of Pillow can open, with the plugins that are installed."""
    Image.init()
    for module, register in _PLUGINS.items():
        with suppress(Exception):  # not installed, or not made for this Pillow
            register(importlib.import_module(module))
    return tuple(name for name in FORMATS if name in Image.OPEN)


_PLUGINS: dict[str, Callable[[Any], object]] = {
    "pillow_avif": lambda module: module,  # importing these two is enough
    "pillow_jxl": lambda module: module,
    "pillow_heif": lambda module: module.register_heif_opener(),
}


@contextmanager
def _ignored_warnings() -> Iterator[None]:
    """Ignore Pillow's warnings, about large images and odd EXIF data; both are handled here."""
    with _WARNING_FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
