"""Orientation: wherever it stands in a file, an image's size and its pixels go by the same one."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
from PIL import Image, TiffImagePlugin

from aclora_core.dataset.decoding import load_image
from tests.support.image_files import png_bytes, png_chunk, scanned_image, two_halves, with_chunk

XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def exif(orientation: int = 6) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def itxt(text: str, packed: bool = False) -> bytes:
    body = zlib.compress(text.encode()) if packed else text.encode()
    return png_chunk(b"iTXt", b"XML:com.adobe.xmp\0" + bytes([packed, 0]) + b"\0\0" + body)


def raw_profile(data: bytes) -> bytes:
    text = f"\nexif\n{len(data):8}\n{data.hex()}\n".encode()
    return png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))


def assert_turned(path: Path) -> None:
    """The file of 160 × 80 has a red left half, which becomes the upper one."""
    found = scanned_image(path)
    assert found.size == (80, 160)
    shown = load_image(found, (80, 160))
    assert shown[40, 40, 0] > 0.9 and shown[120, 40, 2] > 0.9


@pytest.mark.parametrize("behind_pixels", [False, True])
@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"eXIf", exif().removeprefix(b"Exif\0\0")),
        png_chunk(b"eXIf", exif()),
        itxt(XMP),
        itxt(XMP, packed=True),
        itxt(XMP.replace('="6"', ">6<")),
        itxt(XMP + " " * 3_000_000, packed=True),
        raw_profile(exif()),
    ],
    ids=["EXIF", "EXIF with its mark", "XMP", "packed XMP", "XMP element", "long XMP", "hexadecimal EXIF"],
)
def test_a_png_is_turned_wherever_it_says_so(tmp_path: Path, chunk: bytes, behind_pixels: bool) -> None:
    (tmp_path / "a.png").write_bytes(with_chunk(png_bytes(two_halves(160, 80)), chunk, behind_pixels))
    assert_turned(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["jpg", "webp", "avif", "tif"])
def test_other_formats_are_turned_by_exif_and_by_xmp(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    two_halves(160, 80).save(path, exif=exif(), quality=95)
    assert_turned(path)
    if suffix == "tif":
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[700] = XMP.encode()
        two_halves(160, 80).save(path, tiffinfo=tags)
    else:
        two_halves(160, 80).save(path, xmp=XMP.encode(), quality=95)
    assert_turned(path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_orientation_is_undone(tmp_path: Path, orientation: int) -> None:
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    upright = two_halves(160, 80)
    upright.paste("green", (0, 0, 40, 40))
    stored = upright.transpose(inverse[orientation]) if orientation > 1 else upright
    stored.save(tmp_path / "a.png", exif=exif(orientation))
    found = scanned_image(tmp_path / "a.png")
    assert found.size == (160, 80)
    assert (load_image(found, (160, 80)) * 255).round().byte().numpy().tobytes() == upright.tobytes()


@pytest.mark.parametrize("data", [b"", b"II*\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"\xff" * 40, exif(0), exif(9)])
def test_an_orientation_that_makes_no_sense_is_passed_over(tmp_path: Path, data: bytes) -> None:
    two_halves(160, 80).save(tmp_path / "a.jpg", exif=data)
    (tmp_path / "a.png").write_bytes(with_chunk(png_bytes(two_halves(160, 80)), png_chunk(b"eXIf", data)))
    for name in ("a.jpg", "a.png"):
        assert load_image(scanned_image(tmp_path / name), (160, 80)).shape == (80, 160, 3)
