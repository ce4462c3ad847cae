"""The sizes that pictures are brought to: near the resolution's area, on the grid, in usual shapes."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aclora_core.dataset import decoding as images
from aclora_core.dataset.buckets import bucket_for, bucket_step
from aclora_core.dataset.image import CaptionedImage


@pytest.mark.parametrize(("resolution", "step"), [(64, 16), (128, 16), (256, 32), (384, 32), (512, 64), (1024, 64)])
def test_the_step_follows_the_resolution(resolution: int, step: int) -> None:
    assert bucket_step(resolution) == step
    assert bucket_step(resolution, 32) == max(step, 32)
    assert bucket_for(700, 700, resolution) == (resolution, resolution)


def test_usual_shapes_get_usual_buckets() -> None:
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
        found = CaptionedImage(Path("a"), "a", "", width, height)
        assert images.cropped_fraction(found, bucket) < 0.2
