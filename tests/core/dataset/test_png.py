"""PNG files: only what their pixels need can make them unreadable."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aclora_core.dataset.decoding import load_image
from aclora_core.dataset.folder import scan_folder
from aclora_core.dataset.png import read_png
from tests.support.icc import DISPLAY_P3, as_srgb, rgb_profile
from tests.support.image_files import png_bytes, png_chunk, scanned_image, with_chunk

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def damaged(chunk: bytes) -> bytes:
    return chunk[:-1] + bytes([chunk[-1] ^ 1])


@pytest.mark.parametrize("behind_pixels", [False, True])
@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"{}" * 700_000)),
        png_chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(b"{}" * 700_000)),
        png_chunk(b"zTXt", b"workflow\0\0not compressed"),
        png_chunk(b"iCCP", b"profile\0\0not compressed"),
        png_chunk(b"iCCP", b"bomb\0\0" + zlib.compress(bytes(40 << 20))),
        png_chunk(b"tEXt", b"parameters\0" + b"a" * 5_000_000),
        damaged(png_chunk(b"tEXt", b"Comment\0hello")),
        damaged(png_chunk(b"eXIf", b"MM\0*")),
        png_chunk(b"pHYs", b"short"),
        png_chunk(b"acTL", b""),
        png_chunk(b"fcTL", b"odd"),
    ],
    ids=lambda chunk: f"{chunk[4:8].decode()} of {len(chunk)} bytes",
)
def test_parts_beside_the_pixels_do_no_harm(tmp_path: Path, chunk: bytes, behind_pixels: bool) -> None:
    (tmp_path / "a.png").write_bytes(with_chunk(png_bytes(NOISE), chunk, behind_pixels))
    shown = load_image(scanned_image(tmp_path / "a.png"), (64, 64))
    assert (shown * 255).round().byte().numpy().tobytes() == NOISE.tobytes()


def test_a_long_profile_is_used(tmp_path: Path) -> None:
    profile = rgb_profile(DISPLAY_P3)
    long = profile + bytes(2 << 20)
    long = struct.pack(">I", len(long)) + long[4:]
    chunk = png_chunk(b"iCCP", b"long\0\0" + zlib.compress(long))
    (tmp_path / "a.png").write_bytes(with_chunk(png_bytes(NOISE), chunk))
    shown = (load_image(scanned_image(tmp_path / "a.png"), (64, 64)) * 255).round().numpy()
    assert np.abs(shown - as_srgb(NOISE, profile)).max() <= 1


def test_a_transparent_colour_in_16_bits_is_transparent(tmp_path: Path) -> None:
    rows = (b"\0" + struct.pack(">HHH", 0x1234, 0x5678, 0x9ABC) * 64) * 64
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 16, 2, 0, 0, 0))
    key = png_chunk(b"tRNS", struct.pack(">HHH", 0x1234, 0x5678, 0x9ABC))
    body = png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + key + body)
    assert (load_image(scanned_image(tmp_path / "a.png"), (64, 64)) == 1).all()
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + body)
    assert (load_image(scanned_image(tmp_path / "a.png"), (64, 64)) < 1).all()


def test_damaged_pixels_are_an_error(tmp_path: Path) -> None:
    data = bytearray(png_bytes(NOISE))
    data[data.index(b"IDAT") + 500] ^= 255
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.png was skipped: it cannot be read as an image"):
        load_image(scanned_image(tmp_path / "a.png"), (64, 64))


def test_the_pixels_are_a_file_without_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(with_chunk(png_bytes(NOISE), png_chunk(b"tEXt", b"Comment\0" + bytes(100_000))))
    with open(path, "rb", buffering=0) as file:
        pixels = read_png(file).pixels
        assert pixels.read() == png_bytes(NOISE)
        assert pixels.seek(-4, io.SEEK_END) == len(png_bytes(NOISE)) - 4
        assert pixels.read() == png_bytes(NOISE)[-4:] and pixels.read() == b""


def test_an_animated_png_is_told(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    NOISE.save(tmp_path / "b.png")
    assert [image.moving for image in scan_folder(tmp_path).images] == [True, False]
    assert load_image(scanned_image(tmp_path / "a.png"), (64, 64))[0, 0].tolist() == [1, 0, 0]
