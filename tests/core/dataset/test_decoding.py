"""Decoding: every format becomes upright RGB on white, and damaged files are named."""

from __future__ import annotations

import math
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aclora_core.dataset.decoding import cropped_fraction, load_image, upscale_factor
from aclora_core.dataset.folder import scan_folder
from aclora_core.dataset.image import CaptionedImage
from aclora_core.dataset.opening import read_header
from tests.support.image_files import save_image, scanned_image, two_halves


def test_a_truncated_image_is_an_error_that_names_it(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for suffix in ("png", "jpg", "webp"):
        path = tmp_path / f"cut.{suffix}"
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:-1500])
        with pytest.raises(ValueError, match=rf"cut\.{suffix} was skipped: it cannot be read"):
            load_image(CaptionedImage(path, path.name, "", 64, 64), (64, 64))


def fake_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" * (1 + (width + 7) // 8)
    packer = zlib.compressobj(1)
    body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_a_100_megapixel_image_loads_without_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    path.write_bytes(fake_png(10_000, 10_000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_image(scanned_image(path), (64, 64))
    assert loaded.shape == (64, 64, 3)
    assert loaded.max() == 0


def test_a_decompression_bomb_is_skipped_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(fake_png(200_000, 1)[:16] + struct.pack(">II", 60_000, 60_000))
    data = fake_png(64, 64)
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    bomb = data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    (tmp_path / "bomb.png").write_bytes(bomb)
    save_image(tmp_path / "good.png")
    result = scan_folder(tmp_path)
    assert len(result.images) == 1
    assert result.problems == ("bomb.png was skipped: it has more than 178 megapixels. Make it smaller.",)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_exif_rotation_is_honoured(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the left side of the file is the top
    path = tmp_path / f"turned.{suffix}"
    two_halves(160, 80).save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    found = scanned_image(path)
    assert found.size == (80, 160)
    loaded = load_image(found, (80, 160))
    assert loaded.shape == (160, 80, 3)
    top, bottom = loaded[40, 40], loaded[120, 40]
    torch.testing.assert_close(top, torch.tensor([1.0, 0.0, 0.0]), atol=0.02, rtol=0)
    torch.testing.assert_close(bottom, torch.tensor([0.0, 0.0, 1.0]), atol=0.02, rtol=0)


def loaded_pixel(path: Path) -> list[float]:
    loaded = load_image(scanned_image(path), (64, 64))
    assert loaded.dtype == torch.float32 and loaded.shape == (64, 64, 3)
    return [round(value, 2) for value in loaded[32, 32].tolist()]


def test_transparency_becomes_white(tmp_path: Path) -> None:
    Image.new("RGBA", (64, 64), (255, 0, 0, 128)).save(tmp_path / "rgba.png")
    Image.new("LA", (64, 64), (0, 0)).save(tmp_path / "la.png")
    Image.new("RGB", (64, 64), (1, 2, 3)).save(tmp_path / "key.png", transparency=(1, 2, 3))
    palette = Image.new("P", (64, 64), 1)
    palette.putpalette([0, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "p.png", transparency=1)
    palette.save(tmp_path / "p.gif")
    assert loaded_pixel(tmp_path / "rgba.png") == [1.0, 0.5, 0.5]
    assert loaded_pixel(tmp_path / "la.png") == [1.0, 1.0, 1.0]
    assert loaded_pixel(tmp_path / "key.png") == [1.0, 1.0, 1.0]
    assert loaded_pixel(tmp_path / "p.png") == [1.0, 1.0, 1.0]
    assert loaded_pixel(tmp_path / "p.gif") == [0.0, 1.0, 0.0]


def test_deep_grey_and_cmyk_become_rgb(tmp_path: Path) -> None:
    half = np.full((64, 64), 32768, dtype=np.uint16)
    Image.fromarray(half).save(tmp_path / "deep.png")
    Image.fromarray(half).save(tmp_path / "deep.tif")
    Image.fromarray(half.astype(np.int32)).save(tmp_path / "int.tif")
    Image.fromarray(np.full((64, 64), 0.25, dtype=np.float32)).save(tmp_path / "float.tif")
    Image.new("L", (64, 64), 51).save(tmp_path / "grey.png")
    Image.new("1", (64, 64), 1).save(tmp_path / "bit.png")
    Image.new("CMYK", (64, 64), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    assert loaded_pixel(tmp_path / "deep.png") == [0.5, 0.5, 0.5]
    assert loaded_pixel(tmp_path / "deep.tif") == [0.5, 0.5, 0.5]
    assert loaded_pixel(tmp_path / "int.tif") == [0.5, 0.5, 0.5]
    assert loaded_pixel(tmp_path / "float.tif") == [0.25, 0.25, 0.25]
    assert loaded_pixel(tmp_path / "grey.png") == [0.2, 0.2, 0.2]
    assert loaded_pixel(tmp_path / "bit.png") == [1.0, 1.0, 1.0]
    red, green, blue = loaded_pixel(tmp_path / "print.jpg")
    assert red > 0.9 and green < 0.1 and blue < 0.1


def test_an_image_is_scaled_to_cover_its_bucket_and_cropped_evenly(tmp_path: Path) -> None:
    stripes = Image.new("RGB", (300, 100), "white")
    stripes.paste("black", (100, 0, 200, 100))  # the middle third
    stripes.save(tmp_path / "wide.png")
    found = scanned_image(tmp_path / "wide.png")
    loaded = load_image(found, (64, 64))
    assert loaded[:, 2:-2].max() < 0.02  # only the middle is left
    assert math.isclose(cropped_fraction(found, (64, 64)), 2 / 3)
    assert math.isclose(upscale_factor(found, (64, 64)), 0.64)
    assert math.isclose(upscale_factor(found, (64, 200)), 2.0)


def test_an_image_of_the_size_of_its_bucket_is_unchanged(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    loaded = load_image(scanned_image(tmp_path / "a.png"), (64, 48))
    torch.testing.assert_close(loaded, torch.from_numpy(pixels).float() / 255, atol=0, rtol=0)


def test_a_large_jpeg_decoded_at_reduced_size_looks_the_same(tmp_path: Path) -> None:
    wave = np.add.outer(np.sin(np.arange(900) / 90), np.cos(np.arange(1200) / 70))
    photo = Image.fromarray(((wave + 2) * 63).astype(np.uint8)).convert("RGB")
    photo.save(tmp_path / "photo.jpg", quality=95)
    photo.save(tmp_path / "photo.png")
    small = [load_image(scanned_image(tmp_path / name), (64, 48)) for name in ("photo.jpg", "photo.png")]
    torch.testing.assert_close(small[0], small[1], atol=0.02, rtol=0)


def test_decoding_leaves_no_file_open(tmp_path: Path) -> None:
    path = save_image(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        load_image(scanned_image(path), (64, 64))
        with pytest.raises(ValueError):
            read_header(Path(__file__), "test.py")
