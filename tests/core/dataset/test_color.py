"""Embedded colour profiles: what is loaded is sRGB, and a broken profile does no harm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from aclora_core.dataset.color import conversion_to_srgb
from aclora_core.dataset.decoding import load_image
from aclora_core.dataset.masks import load_mask
from tests.support.icc import ADOBE_RGB, DISPLAY_P3, as_srgb, cmyk_profile, grey_profile, rgb_profile
from tests.support.image_files import png_bytes, save_image, scanned_image

SIZE = (64, 64)


def colors(mode: str) -> Image.Image:
    """Blocks of 8 × 8 pixels of different colours."""
    pixels = np.random.default_rng(3).integers(0, 256, (8, 8, len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(), mode).resize(SIZE, Image.Resampling.NEAREST)


def loaded(path: Path) -> np.ndarray:
    return np.asarray(load_image(scanned_image(path), SIZE) * 255).round().astype(int)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected.astype(int)).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
@pytest.mark.parametrize("profile", [rgb_profile(DISPLAY_P3), rgb_profile(ADOBE_RGB), rgb_profile(DISPLAY_P3, 1.0)])
def test_colors_of_a_wide_gamut_become_srgb(tmp_path: Path, suffix: str, profile: bytes) -> None:
    path = tmp_path / f"a.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    colors("RGB").save(path, icc_profile=profile, **options)
    assert_close(loaded(path), as_srgb(colors("RGB"), profile))
    assert np.abs(loaded(path) - np.asarray(colors("RGB")).astype(int)).max() > 10


def test_a_photograph_becomes_srgb(tmp_path: Path) -> None:
    profile = rgb_profile(DISPLAY_P3)
    save_image(tmp_path / "a.jpg", SIZE, (200, 60, 50), icc_profile=profile)
    assert np.abs(loaded(tmp_path / "a.jpg")[30, 30] - [219, 37, 34]).max() <= 3


def test_grey_and_cmyk_become_srgb(tmp_path: Path) -> None:
    grey, print_ = grey_profile(1.0), cmyk_profile()
    colors("L").save(tmp_path / "grey.png", icc_profile=grey)
    colors("CMYK").save(tmp_path / "print.tif", icc_profile=print_)
    assert_close(loaded(tmp_path / "grey.png"), as_srgb(colors("L"), grey))
    assert_close(loaded(tmp_path / "print.tif"), as_srgb(colors("CMYK"), print_))
    assert np.abs(loaded(tmp_path / "print.tif") - np.asarray(colors("CMYK").convert("RGB")).astype(int)).max() > 10


def test_palettes_alpha_and_grey_with_colours_profile_become_srgb(tmp_path: Path) -> None:
    profile = rgb_profile(ADOBE_RGB)
    palette = colors("RGB").quantize(64)
    palette.save(tmp_path / "palette.png", icc_profile=profile)
    assert_close(loaded(tmp_path / "palette.png"), as_srgb(palette.convert("RGB"), profile))
    half = colors("RGB").convert("RGBA")
    half.putalpha(Image.linear_gradient("L").resize(SIZE))
    half.save(tmp_path / "alpha.png", icc_profile=profile)
    alpha = np.asarray(half.getchannel("A"))[..., None] / 255
    on_white = as_srgb(colors("RGB"), profile) * alpha + 255 * (1 - alpha)
    assert_close(loaded(tmp_path / "alpha.png"), on_white)
    colors("L").save(tmp_path / "grey.png", icc_profile=profile)
    assert_close(loaded(tmp_path / "grey.png"), as_srgb(colors("L").convert("RGB"), profile))


def test_an_srgb_profile_changes_nothing(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    colors("RGB").save(tmp_path / "a.png", icc_profile=profile)
    np.testing.assert_array_equal(loaded(tmp_path / "a.png"), np.asarray(colors("RGB")))


@pytest.mark.parametrize(
    "profile",
    [
        pytest.param(b"no profile", id="text"),
        pytest.param(rgb_profile(DISPLAY_P3)[:200], id="header only"),
        pytest.param(rgb_profile(DISPLAY_P3)[:-100], id="cut"),
        pytest.param(rgb_profile(DISPLAY_P3 / 2), id="white is grey"),
        pytest.param(grey_profile(1.0), id="of grey"),
        pytest.param(cmyk_profile(), id="of CMYK"),
    ],
)
def test_a_profile_that_does_not_fit_changes_nothing(tmp_path: Path, profile: bytes) -> None:
    (tmp_path / "a.png").write_bytes(png_bytes(colors("RGB"), icc_profile=profile))
    np.testing.assert_array_equal(loaded(tmp_path / "a.png"), np.asarray(colors("RGB")))


def test_a_mask_is_not_converted(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    Image.new("L", SIZE, 100).save(tmp_path / "a-masklabel.png", icc_profile=grey_profile(1.0))
    mask = load_mask(scanned_image(tmp_path / "a.png"), SIZE)
    assert mask is not None
    torch.testing.assert_close(mask, torch.full((64, 64), 100 / 255))


def test_nothing_is_converted_without_a_profile() -> None:
    assert conversion_to_srgb(None, "RGB") is None and conversion_to_srgb(b"", "L") is None
    assert conversion_to_srgb(rgb_profile(DISPLAY_P3), "LAB") is None
