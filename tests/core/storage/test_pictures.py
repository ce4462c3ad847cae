"""Image tensors as images: any number of channels, and values that no pixel can have."""

from __future__ import annotations

import math

import pytest
import torch

from aclora_core.storage import to_pil


@pytest.mark.parametrize(
    ("channels", "colour"), [(1, (51, 51, 51)), (2, (51, 51, 51)), (3, (51, 102, 153)), (4, (51, 102, 153))]
)
def test_an_image_of_any_number_of_channels_becomes_rgb(channels: int, colour: tuple[int, ...]) -> None:
    picture = to_pil(torch.tensor([0.2, 0.4, 0.6, 0.8])[:channels].expand(4, 6, channels))
    assert (picture.mode, picture.size) == ("RGB", (6, 4)) and picture.getpixel((5, 3)) == colour


@pytest.mark.parametrize(
    ("value", "level"), [(-1.0, 0), (0.0, 0), (0.5, 128), (1.0, 255), (7.0, 255), (math.nan, 0), (math.inf, 0)]
)
def test_values_are_rounded_clamped_and_black_where_they_are_not_finite(value: float, level: int) -> None:
    assert to_pil(torch.full((2, 2, 3), value)).getpixel((0, 0)) == (level,) * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_all_levels_of_a_pixel_are_kept_in_other_types(dtype: torch.dtype) -> None:
    levels = [0, 64, 128, 255]
    picture = to_pil((torch.tensor(levels) / 255).to(dtype).reshape(1, 4, 1).requires_grad_())
    assert [picture.getpixel((place, 0))[0] for place in range(4)] == levels
