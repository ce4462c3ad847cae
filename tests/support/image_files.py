"""Image files for the tests of the dataset room."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

from PIL import Image

from aclora_core.dataset.folder import scan_folder
from aclora_core.dataset.image import CaptionedImage


def save_image(
    path: Path, size: tuple[int, int] = (64, 64), color: str | tuple[int, ...] = "red", **options: object
) -> Path:
    """Save an image of one colour; missing folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return path


def two_halves(width: int = 80, height: int = 40) -> Image.Image:
    """An image whose left half is red and whose right half is blue."""
    image = Image.new("RGB", (width, height), "red")
    image.paste("blue", (width // 2, 0, width, height))
    return image


def scanned_image(path: Path) -> CaptionedImage:
    """The image as a scan of its folder finds it."""
    (found,) = (image for image in scan_folder(path.parent).images if image.path == path)
    return found


def png_bytes(image: Image.Image, **options: object) -> bytes:
    """The image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(png: bytes, chunk: bytes, behind_pixels: bool = False) -> bytes:
    """A PNG file with one more chunk, behind its header or behind its pixels."""
    place = len(png) - 12 if behind_pixels else 33  # an IEND chunk has 12 bytes, the signature and IHDR have 33
    return png[:place] + chunk + png[place:]
