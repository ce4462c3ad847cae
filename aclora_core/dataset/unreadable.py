"""Why an image cannot be read, in a true sentence."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import UnidentifiedImageError

HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
AVIF_BRANDS = frozenset({b"avif", b"avis"})
# What can be read only with a plugin: Pillow's name of the format, and what to install.
_PLUGINS = {
    "HEIC": ("HEIF", "pillow-heif"),
    "AVIF": ("AVIF", "pillow-avif-plugin"),
    "JXL": ("JXL", "pillow-jxl-plugin"),
}
_MARKS = (  # what files begin with
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF8", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\xff\x0a", "JXL"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JXL"),
    (b"BM", "BMP"),
)
_OTHER_MARKS = (
    (b"8BPS", "a Photoshop file"),
    (b"%PDF", "a PDF file"),
    (b"%!PS", "a PostScript file"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 image"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (b"\x76\x2f\x31\x01", "an OpenEXR image"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1a\x45\xdf\xa3", "a video"),
)


def reason(error: Exception, path: Path, formats: Sequence[str]) -> str:
    """Return why a file could not be opened or decoded, without the full path of a private file.

    Args:
        error: what opening or decoding it raised.
        path: the file.
        formats: Pillow's names of the formats that can be read here.
    """
    if isinstance(error, MemoryError):
        return "there is not enough memory to decode it; make it smaller"
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # which a wrong offset in a file gives
        return _system_reason(error)
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError as unreadable:
        return _system_reason(unreadable)
    message = "" if isinstance(error, UnidentifiedImageError) else str(error).strip().split("\n")[0]
    return _reason_by_content(start, message, formats)


def _system_reason(error: OSError) -> str:
    if error.errno == errno.EACCES:
        return "ComfyUI may not read the file; change its permissions"
    return os.strerror(error.errno) if error.errno else str(error)


def _reason_by_content(start: bytes, message: str, formats: Sequence[str]) -> str:
    """What the first bytes of a file say that no decoder accepts.

    Args:
        start: the first bytes.
        message: of the decoder; may be empty.
        formats: that can be read here.
    """
    if not start:
        return "the file is empty; download or save it again"
    kind = _image_kind(start)
    if kind in _PLUGINS and _PLUGINS[kind][0] not in formats:
        plugin = _PLUGINS[kind][1]
        return f"{kind} images need the Python package {plugin}: install it, or save the image as PNG or JPEG"
    if kind is not None:
        rare = "supported, such as 32-bit float colours" if kind == "TIFF" else "supported"
        detail = f" ({message})" if message else ""
        return f"the {kind} is damaged or of a kind that is not {rare}{detail}; save it again, as PNG if need be"
    other = _other_kind(start)
    if other is not None:
        return f"it is {other}; save the image as PNG or JPEG"
    return message or "its content is none of " + ", ".join(formats)


def _image_kind(start: bytes) -> str | None:
    """The format that a file claims by its first bytes, if it is one that is read here or with a plugin."""
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "WEBP"
    if start[4:8] == b"ftyp":
        brand = start[8:12]
        # Both formats may begin with a brand of all such containers; the compatible ones then tell which it is.
        if brand in AVIF_BRANDS or (brand in (b"mif1", b"msf1") and b"avif" in start[12:64]):
            return "AVIF"
        return "HEIC" if brand in HEIC_BRANDS else None
    return next((kind for mark, kind in _MARKS if start.startswith(mark)), None)


def _other_kind(start: bytes) -> str | None:
    if start[4:8] == b"ftyp":
        return "a video"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "a web page"
    if text.startswith(b"<svg") or (text.startswith(b"<?xml") and b"<svg" in text):
        return "an SVG drawing"
    return next((kind for mark, kind in _OTHER_MARKS if start.startswith(mark)), None)
