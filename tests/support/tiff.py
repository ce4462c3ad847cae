"""Uncompressed TIFF files of any number type."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_SAMPLE_FORMAT = {"u": 1, "i": 2, "f": 3}


def save_tiff(
    path: Path, pixels: np.ndarray, photometric: int | None = None, extra_samples: Sequence[int] = ()
) -> Path:
    """Save pixels, (height, width) or (height, width, channels), little-endian.

    Args:
        path: of the file.
        pixels: of any type.
        photometric: what the numbers mean: 0 grey from white, 1 grey from black, 2 RGB, 5 CMYK, 8 Lab; by the number of
            channels if None.
        extra_samples: of the further channels: 1 alpha that the colours were multiplied with, 2 alpha, 0 anything.
    """
    height, width, channels = (*pixels.shape, 1)[:3]
    if photometric is None:
        photometric = 1 if channels == 1 else 2
    bits = 8 * pixels.dtype.itemsize
    tags: list[tuple[int, str, list[int]]] = [
        (256, "L", [width]),
        (257, "L", [height]),
        (258, "H", [bits] * channels),
        (259, "H", [1]),
        (262, "H", [photometric]),
        (273, "L", [0]),
        (277, "H", [channels]),
        (278, "L", [height]),
        (279, "L", [pixels.nbytes]),
        (339, "H", [_SAMPLE_FORMAT[pixels.dtype.kind]] * channels),
    ]
    if extra_samples:
        tags.insert(-1, (338, "H", list(extra_samples)))
    path.write_bytes(_file(tags, pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()))
    return path


def _file(tags: list[tuple[int, str, list[int]]], data: bytes) -> bytes:
    end_of_tags = 8 + 2 + 12 * len(tags) + 4
    long_values = b""
    directory = struct.pack("<H", len(tags))
    data_at = end_of_tags + sum(_size(kind, values) for _, kind, values in tags if _size(kind, values) > 4)
    for number, kind, values in tags:
        packed = struct.pack(f"<{len(values)}{kind}", *([data_at] if number == 273 else values))
        if len(packed) > 4:
            place = struct.pack("<L", end_of_tags + len(long_values))
            long_values += packed
        else:
            place = packed.ljust(4, b"\0")
        directory += struct.pack("<HHL", number, {"H": 3, "L": 4}[kind], len(values)) + place
    return b"II*\0" + struct.pack("<L", 8) + directory + bytes(4) + long_values + data


def _size(kind: str, values: list[int]) -> int:
    return struct.calcsize(f"<{len(values)}{kind}")
