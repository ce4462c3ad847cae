"""Number types: deep and odd ones are shown right, or refused with a true sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aclora_core.dataset.decoding import load_image
from aclora_core.dataset.image import CaptionedImage
from aclora_core.dataset.masks import load_mask
from tests.support.image_files import scanned_image
from tests.support.tiff import save_tiff


def grey(tmp_path: Path, values: list[float], kind: str, photometric: int = 1) -> list[float]:
    """What is loaded from an image whose quarters have these four values."""
    pixels = np.array(values, dtype=kind).reshape(2, 2).repeat(32, 0).repeat(32, 1)
    path = save_tiff(tmp_path / "a.tif", pixels, photometric)
    loaded = load_image(scanned_image(path), (64, 64))
    assert loaded.shape == (64, 64, 3) and (loaded == loaded[..., :1]).all()
    return [round(loaded[y, x, 0].item(), 2) for y in (16, 48) for x in (16, 48)]


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("u1", [0, 64, 128, 255]),
        ("u2", [0, 16384, 32768, 65535]),
        ("i2", [0, 8192, 16384, 32767]),
        ("u4", [0, 1 << 30, 1 << 31, (1 << 32) - 1]),
        ("i4", [0, 1 << 29, 1 << 30, (1 << 31) - 1]),
        ("i4", [0, 64, 128, 255]),
        ("i4", [-9, 16384, 32768, 65535]),
        ("f4", [0, 0.25, 0.5, 1]),
        ("f4", [-1, 0.25, 0.5, 8]),
        ("f4", [np.nan, 0.25, 0.5, np.inf]),
        ("f4", [0, 64, 128, 255]),
    ],
)
def test_every_type_of_grey_is_scaled_to_its_white(tmp_path: Path, kind: str, values: list[float]) -> None:
    assert grey(tmp_path, values, kind) == [0, 0.25, 0.5, 1]


@pytest.mark.parametrize(("kind", "white"), [("u1", 255), ("u2", 65535), ("f4", 1)])
def test_grey_that_counts_from_white_is_no_negative(tmp_path: Path, kind: str, white: float) -> None:
    found = grey(tmp_path, [0, white / 4, white / 2, white], kind, photometric=0)
    np.testing.assert_allclose(found, [1, 0.75, 0.5, 0], atol=0.011)


def test_colours_in_16_bits_with_and_without_alpha_are_shown(tmp_path: Path) -> None:
    colors = np.full((64, 64, 4), [65535, 32768, 0, 65535], dtype="u2")
    for name, pixels, extra in (("a.tif", colors[..., :3], []), ("b.tif", colors, [2]), ("c.tif", colors, [1])):
        shown = load_image(scanned_image(save_tiff(tmp_path / name, pixels, extra_samples=extra)), (64, 64))
        assert [round(value, 1) for value in shown[5, 5].tolist()] == [1, 0.5, 0]


@pytest.mark.parametrize(("kind", "channels"), [("f4", 3), ("f2", 1), ("f8", 1), ("u4", 3)])
def test_a_type_that_cannot_be_read_is_called_so(tmp_path: Path, kind: str, channels: int) -> None:
    save_tiff(tmp_path / "a.tif", np.ones((64, 64, channels), dtype=kind).squeeze())
    with pytest.raises(ValueError, match=r"a\.tif .*a kind that is not supported, such as 32-bit float"):
        load_image(CaptionedImage(tmp_path / "a.tif", "a.tif", "", 64, 64), (64, 64))


def test_floats_without_a_finite_number_are_an_error(tmp_path: Path) -> None:
    path = save_tiff(tmp_path / "a.tif", np.full((64, 64), np.nan, dtype="f4"))
    with pytest.raises(ValueError, match=r"a\.tif was skipped: .*none of its values is a finite number"):
        load_image(scanned_image(path), (64, 64))


def test_a_transparent_value_of_deep_grey_is_white_and_masked_out(tmp_path: Path) -> None:
    values = np.full((64, 64), 1000, dtype=np.uint16)
    values[:, 32:] = 40000
    Image.fromarray(values).save(tmp_path / "a.png", transparency=1000)
    found = scanned_image(tmp_path / "a.png")
    assert (load_image(found, (64, 64))[:, :32] == 1).all() and load_image(found, (64, 64))[5, 50, 0] < 0.7
    mask = load_mask(found, (64, 64), alpha=True)
    assert mask is not None and not mask[:, :32].any() and (mask[:, 32:] == 1).all()
