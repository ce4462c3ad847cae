"""Random damages of image files of many formats and modes."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from tests.support import fuzz
from tests.support.icc import DISPLAY_P3, cmyk_profile, grey_profile, rgb_profile

WIDTH, HEIGHT = 72, 48
_MODES = {
    "png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "jpg": ("L", "RGB", "CMYK"),
    "webp": ("RGB", "RGBA"),
    "bmp": ("1", "L", "P", "RGB", "RGBA"),
    "gif": ("L", "P"),
    "tif": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"),
    "avif": ("L", "RGB", "RGBA"),
}
_OPTIONS: dict[str, tuple[dict[str, object], ...]] = {
    "png": ({"compress_level": 0},),
    "jpg": ({"progressive": True},),
    "webp": ({"lossless": True},),
    "tif": ({"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}, {"compression": "packbits"}),
}


def whole_files() -> list[tuple[str, bytes]]:
    """Return image files that are sound, each with its suffix: all modes, with metadata, and moving ones."""
    files = []
    for suffix, modes in _MODES.items():
        for mode in modes:
            for options in ({}, *_OPTIONS.get(suffix, ()), _metadata(mode)):
                files.append((suffix, _saved(_picture(mode), suffix, options)))
    for suffix in ("png", "webp", "gif", "tif", "avif"):
        moving = {"save_all": True, "append_images": [_picture("RGB", 1), _picture("RGB", 2)]}
        files.append((suffix, _saved(_picture("RGB"), suffix, moving)))
    return files


def damaged_files(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Yield damaged files, each with its suffix."""
    files, draw = whole_files(), fuzz.chance(seed)
    for _ in range(count):
        suffix, data = draw.choice(files)
        for _ in range(draw.randint(1, 3)):
            data = draw.choice(_DAMAGES)(data, draw)
        yield suffix, data


def _picture(mode: str, seed: int = 0) -> Image.Image:
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 4), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    if mode == "F":
        return Image.fromarray(pixels[..., 0].astype(np.float32) / 255)
    if mode == "LAB":
        return Image.frombytes("LAB", (WIDTH, HEIGHT), pixels[..., :3].tobytes())
    return Image.fromarray(pixels).convert(mode)


def _metadata(mode: str) -> dict[str, object]:
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = {"L": grey_profile(1.0), "CMYK": cmyk_profile()}.get(mode, rgb_profile(DISPLAY_P3))
    return {"exif": exif.tobytes(), "icc_profile": profile}


def _saved(image: Image.Image, suffix: str, options: dict[str, object]) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()), **options)
    return buffer.getvalue()


def _flip(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    # Headers are short and decide most, so half of the damages are there.
    limit = draw.choice((min(len(data), 200), len(data)))
    for _ in range(draw.randint(1, 8)):
        changed[draw.randrange(limit)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _overwrite(data: bytes, draw: random.Random) -> bytes:
    start, length = draw.randrange(len(data)), draw.choice((1, 2, 4, 4, 16, 200))
    filling = draw.choice((b"\0" * length, b"\xff" * length, draw.randbytes(length)))
    return (data[:start] + filling + data[start + length :])[: len(data)]


def _cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data)) + 1]


def _remove(data: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(data))
    return data[:start] + data[start + draw.randint(1, 100) :] or data


def _repeat(data: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(data))
    part = data[start : start + draw.randint(1, 300)]
    return data[:start] + part * draw.randint(2, 5) + data[start:]


_DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (_flip, _flip, _overwrite, _cut, _remove, _repeat)
