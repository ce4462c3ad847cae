"""The sizes that pictures are brought to: about one area, and many shapes."""

from __future__ import annotations

import math
from functools import lru_cache


def bucket_step(resolution: int, multiple: int = 8) -> int:
    """The grid of bucket sides: about resolution / 8 as a power of two from 16 to 64, and a multiple of `multiple`."""
    power = 1 << (max(resolution // 8, 1).bit_length() - 1)
    return math.lcm(min(64, max(16, power)), multiple)


def bucket_for(width: int, height: int, resolution: int, step: int | None = None) -> tuple[int, int]:
    """The (width, height) nearest in shape: about resolution² pixels, sides multiples of `step`, at most 4 : 1."""
    step = bucket_step(resolution) if step is None else step
    if step > resolution:
        raise ValueError(
            f"Resolution {resolution} is too small: picture sides have to be multiples of {step} pixels here. "
            f"Raise the resolution to {step} or more."
        )
    shape = math.log(width / height)
    area = resolution * resolution
    return min(
        _buckets(resolution, step),
        key=lambda size: (round(abs(math.log(size[0] / size[1]) - shape), 9), abs(size[0] * size[1] - area), size),
    )


@lru_cache(maxsize=16)
def _buckets(resolution: int, step: int) -> tuple[tuple[int, int], ...]:
    """Every size on the grid from square to 4 : 1, both ways round, whose area is within an eighth of resolution²."""
    area = resolution * resolution
    square = math.floor(resolution / step + 0.5) * step
    sizes = {(square, square)}
    for long in range(square + step, 2 * square + 1, step):
        below = max(area // (long * step), 1) * step
        fitting = [short for short in (below, below + step) if abs(long * short / area - 1) <= 1 / 8]
        for short in fitting or [below]:
            sizes |= {(long, short), (short, long)}
    return tuple(sorted(sizes))
