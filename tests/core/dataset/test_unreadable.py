"""Sentences about images that cannot be read: true, and with what to do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from aclora_core.dataset import opening
from aclora_core.dataset.folder import scan_folder
from tests.support.image_files import png_bytes, save_image


def problem(tmp_path: Path, name: str, content: bytes) -> str:
    save_image(tmp_path / "good.png")
    (tmp_path / name).write_bytes(content)
    (found,) = scan_folder(tmp_path).problems
    assert found.startswith(f"{name} was skipped") and str(tmp_path) not in found
    return found


def ftyp(brand: bytes, *compatible: bytes) -> bytes:
    return b"\0\0\0\x20ftyp" + brand + b"\0\0\0\0" + b"".join(compatible) + bytes(100)


PNG = png_bytes(Image.new("RGB", (64, 64)))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.png", b"", "the file is empty; download or save it again"),
        ("a.png", PNG[:20], "the PNG is damaged or of a kind that is not supported"),
        ("a.jpg", b"\xff\xd8\xff\xe0" + bytes(50), "the JPEG is damaged or of a kind that is not supported"),
        ("a.webp", b"RIFF\x20\0\0\0WEBPVP8 " + bytes(50), "the WEBP is damaged or of a kind that is not supported"),
        ("a.tif", b"II*\0" + bytes(50), "the TIFF is damaged or of a kind that is not supported, such as"),
        ("a.jpg", b"8BPS" + bytes(50), "it is a Photoshop file; save the image as PNG or JPEG"),
        ("a.jpg", b"%PDF-1.7" + bytes(50), "it is a PDF file"),
        ("a.png", b"\n<!DOCTYPE html><html>", "it is a web page"),
        ("a.png", b'<?xml version="1.0"?><svg/>', "it is an SVG drawing"),
        ("a.gif", ftyp(b"isom", b"mp42"), "it is a video"),
        ("a.png", b"some text", "its content is none of PNG, JPEG"),
    ],
)
def test_the_sentence_says_what_the_file_is(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    assert sentence in problem(tmp_path, name, content)


@pytest.mark.parametrize(
    ("content", "missing", "plugin"),
    [
        (ftyp(b"heic", b"mif1"), "HEIF", "HEIC images need the Python package pillow-heif"),
        (ftyp(b"mif1", b"heic"), "HEIF", "HEIC images need the Python package pillow-heif"),
        (ftyp(b"avif", b"mif1"), "AVIF", "AVIF images need the Python package pillow-avif-plugin"),
        (ftyp(b"mif1", b"avif"), "AVIF", "AVIF images need the Python package pillow-avif-plugin"),
        (b"\xff\x0a" + bytes(50), "JXL", "JXL images need the Python package pillow-jxl-plugin"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50), "JXL", "JXL images need the Python package pillow-jxl-plugin"),
    ],
)
def test_a_missing_plugin_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, missing: str, plugin: str
) -> None:
    formats = tuple(name for name in opening._formats() if name != missing)
    monkeypatch.setattr(opening, "_formats", lambda: formats)
    for name in ("a.heic", "a.jpg"):  # telephones and messengers name them wrongly
        assert plugin in problem(tmp_path, name, content)
        (tmp_path / name).unlink()


def test_plugins_that_are_installed_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pillow_heif.py").write_text(
        "from pathlib import Path\ndef register_heif_opener(): Path(__file__ + '.used').touch()"
    )
    (tmp_path / "pillow_jxl.py").write_text("raise RuntimeError('made for another Pillow')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(Image.OPEN, "HEIF", Image.OPEN["PNG"])
    for name in ("pillow_heif", "pillow_jxl"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    opening._formats.cache_clear()
    try:
        assert "HEIF" in opening._formats() and (tmp_path / "pillow_heif.py.used").exists()
    finally:
        opening._formats.cache_clear()
        sys.modules.pop("pillow_heif", None)
