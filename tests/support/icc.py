"""Small ICC profiles, built from gamma and primaries (ICC.1:2001-04)."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image, ImageCms

_D50 = (0.9642, 1.0, 0.8249)
# Columns: red, green and blue in CIE XYZ under D50.
DISPLAY_P3 = np.array([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])
ADOBE_RGB = np.array([[0.6097, 0.2053, 0.1492], [0.3111, 0.6257, 0.0632], [0.0195, 0.0609, 0.7446]])


def rgb_profile(primaries: np.ndarray, gamma: float = 2.2) -> bytes:
    """Return a profile of RGB with these primaries, (3, 3)."""
    curves = {tag: _curve(gamma) for tag in (b"rTRC", b"gTRC", b"bTRC")}
    columns = {tag: _xyz(column) for tag, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries.T, strict=True)}
    return _profile(b"RGB ", b"mntr", columns | curves)


def grey_profile(gamma: float) -> bytes:
    """Return a profile of grey."""
    return _profile(b"GRAY", b"mntr", {b"kTRC": _curve(gamma)})


def cmyk_profile() -> bytes:
    """Return a profile of CMYK whose table has two points for each ink: black ink gives a dark blue."""
    grid = np.stack(np.meshgrid(*[[0.0, 1.0]] * 4, indexing="ij"), -1).reshape(-1, 4)
    light = np.prod(1 - grid, axis=1)
    lab = np.stack([255 * (0.1 + 0.9 * light), 128 + 0 * light, 128 - 40 * (1 - light)], -1).round().astype(np.uint8)
    identity = struct.pack(">9i", *(65536 * np.eye(3, dtype=int).ravel()))
    inks = bytes(range(256)) * 4
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + inks + lab.tobytes() + bytes(range(256)) * 3
    return _profile(b"CMYK", b"prtr", {b"A2B0": table}, b"Lab ")


def as_srgb(image: Image.Image, profile: bytes) -> np.ndarray:
    """Return an image's pixels in sRGB by Pillow's one-line conversion."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return np.asarray(ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB"))


def _profile(space: bytes, kind: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ") -> bytes:
    tags = {b"desc": _description(), b"cprt": b"text\0\0\0\0none\0", b"wtpt": _xyz(_D50)} | tags
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", 128 + len(table) + len(body), b"\0" * 4, 0x02400000, kind, space, connection)
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + b"".join(map(_fixed, _D50))
    return head.ljust(128, b"\0") + table + body


def _description() -> bytes:
    return b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 78


def _xyz(values) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(map(_fixed, values))


def _curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(256 * gamma)) + b"\0\0"


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(65536 * float(value)))
