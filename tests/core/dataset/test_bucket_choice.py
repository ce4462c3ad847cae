"""The sizes of a picture: the resolution's first, and none of the others larger than the picture."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aclora_core.dataset.buckets import bucket_for, parse_resolutions, bucket_sizes
from aclora_core.dataset.decoding import upscale_factor
from aclora_core.dataset.image import CaptionedImage


def picture(width: int, height: int) -> CaptionedImage:
    return CaptionedImage(Path("a.png"), "a.png", "", width, height)


@pytest.mark.parametrize(
    ("text", "expected"), [("", []), ("  ", []), ("768, 1024", [768, 1024]), ("768;1024 768,", [768, 1024])]
)
def test_resolutions_are_read(text: str, expected: list[int]) -> None:
    assert parse_resolutions(text) == expected


@pytest.mark.parametrize("text", ["768x768", "big", "-512", "63", "4097", "512.5", "9999999"])
def test_what_is_no_resolution_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=rf'"768, 1024", but one is "{text}"'):
        parse_resolutions(f"512, {text}")


def test_a_picture_is_shown_in_every_size_that_it_has() -> None:
    assert bucket_sizes(picture(1024, 1024), 512, [768, 1024, 1280], 8) == ([(512, 512), (768, 768), (1024, 1024)], [1280])
    assert bucket_sizes(picture(600, 600), 1024, [512], 8) == ([(1024, 1024), (512, 512)], [])  # as without others
    assert bucket_sizes(picture(900, 900), 512, [512, 512], 8) == ([(512, 512)], [])


@given(st.integers(32, 3000), st.integers(32, 3000), st.lists(st.integers(4, 64), max_size=4))
def test_further_sizes_never_enlarge_and_none_comes_twice(width: int, height: int, more: list[int]) -> None:
    shown = picture(width, height)
    sizes, too_large = bucket_sizes(shown, 256, [16 * each for each in more], 16)
    assert sizes[0] == bucket_for(width, height, 256) and len(set(sizes)) == len(sizes)
    assert all(upscale_factor(shown, size) <= 1 for size in sizes[1:])
    assert all(upscale_factor(shown, bucket_for(width, height, each)) > 1 for each in too_large)
