"""Images of simple shapes, for tests of what networks see."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

BLACK, COLOURED = (0.0, 0.0, 0.0), (0.9, 0.5, 0.1)  # ink


def shapes(
    ink: tuple[float, float, float],
    kinds: Iterable[int] = range(8),
    size: float = 22,
    shift: float = 0,
    outline: bool = False,
) -> Tensor:
    """Return images (n, 64, 64, 3) of different shapes on white, filled or as outlines; there are ten kinds."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    x, y = (x - 32 - shift) / size, (y - 32) / size
    radius, box = (x * x + y * y).sqrt(), torch.maximum(x.abs(), y.abs())
    inside = [  # below 1 inside of the shape
        radius,
        box,
        x.abs() + y.abs(),
        torch.maximum(2 * x.abs() - y, y),
        torch.maximum(x.abs(), 3 * y.abs()),
        torch.maximum(3 * x.abs(), y.abs()),
        torch.minimum(torch.maximum(x.abs(), 3 * y.abs()), torch.maximum(3 * x.abs(), y.abs())),
        (radius - 0.7).abs() + 0.7,
        torch.maximum(2 * x.abs() + y, -y),
        (box - 0.7).abs() + 0.7,
    ]
    masks = torch.stack([(inside[kind] < 1) & ((inside[kind] > 0.75) | (not outline)) for kind in kinds])
    return torch.where(masks[..., None], torch.tensor(ink), torch.ones(3))
