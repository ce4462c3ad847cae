"""Buckets: near the area of the resolution, on the grid, of the nearest aspect ratio; which ones an image gets."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aclora_core.dataset.buckets import bucket_for, bucket_sizes, bucket_step, parse_resolutions
from aclora_core.dataset.decoding import cropped_fraction, upscale_factor
from aclora_core.dataset.image import CaptionedImage


def image(width: int, height: int) -> CaptionedImage:
    return CaptionedImage(Path("a.png"), "a.png", "", width, height)


@pytest.mark.parametrize(("resolution", "step"), [(64, 16), (128, 16), (256, 32), (384, 32), (512, 64), (1024, 64)])
def test_the_step_follows_the_resolution(resolution: int, step: int) -> None:
    assert bucket_step(resolution) == step
    assert bucket_step(resolution, 32) == max(step, 32)
    assert bucket_for(700, 700, resolution) == (resolution, resolution)


def test_common_aspect_ratios_get_common_buckets() -> None:
    assert bucket_for(3000, 2000, 512) == (640, 448)
    assert bucket_for(2000, 3000, 512) == (448, 640)
    assert bucket_for(1920, 1080, 1024) == (1344, 768)
    assert bucket_for(9000, 100, 1024) == (2048, 512)


def test_a_step_over_the_resolution_is_an_error() -> None:
    with pytest.raises(ValueError, match="Resolution 128 is too small.*multiples of 2048"):
        bucket_for(100, 100, 128, 2048)


@settings(max_examples=200, deadline=None)
@given(width=st.integers(32, 20_000), height=st.integers(32, 20_000), sixteenths=st.integers(8, 128))
def test_every_bucket_is_near_its_area_on_the_grid_and_mirrored(width: int, height: int, sixteenths: int) -> None:
    resolution = 16 * sixteenths
    step = bucket_step(resolution)
    bucket = bucket_for(width, height, resolution)
    assert bucket[0] % step == bucket[1] % step == 0
    assert 0.8 < bucket[0] * bucket[1] / resolution**2 < 1.25
    assert bucket_for(height, width, resolution) == bucket[::-1]
    if max(width, height) <= 3 * min(width, height):
        assert cropped_fraction(image(width, height), bucket) < 0.2


@pytest.mark.parametrize(
    ("text", "expected"), [("", []), ("  ", []), ("768, 1024", [768, 1024]), ("768;1024 768,", [768, 1024])]
)
def test_resolutions_are_parsed(text: str, expected: list[int]) -> None:
    assert parse_resolutions(text) == expected


@pytest.mark.parametrize("text", ["768x768", "big", "-512", "63", "4097", "512.5", "9999999"])
def test_a_part_that_is_not_a_resolution_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=rf'"768, 1024", but one is "{text}"'):
        parse_resolutions(f"512, {text}")


def test_an_image_gets_every_size_that_it_is_large_enough_for() -> None:
    assert bucket_sizes(image(1024, 1024), 512, [768, 1024, 1280], 8) == (
        [(512, 512), (768, 768), (1024, 1024)],
        [1280],
    )
    assert bucket_sizes(image(600, 600), 1024, [512], 8) == ([(1024, 1024), (512, 512)], [])  # as without others
    assert bucket_sizes(image(900, 900), 512, [512, 512], 8) == ([(512, 512)], [])


@given(st.integers(32, 3000), st.integers(32, 3000), st.lists(st.integers(4, 64), max_size=4))
def test_further_sizes_never_enlarge_and_never_repeat(width: int, height: int, more: list[int]) -> None:
    shown = image(width, height)
    sizes, too_large = bucket_sizes(shown, 256, [16 * each for each in more], 16)
    assert sizes[0] == bucket_for(width, height, 256) and len(set(sizes)) == len(sizes)
    assert all(upscale_factor(shown, size) <= 1 for size in sizes[1:])
    assert all(upscale_factor(shown, bucket_for(width, height, each)) > 1 for each in too_large)


def test_a_long_resolution_is_shown_shortened() -> None:
    with pytest.raises(ValueError, match=r'but one is "9{20}"\.$'):
        parse_resolutions("9" * 5000)
