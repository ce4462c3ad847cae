"""The sizes that pictures are brought to: about one area, and many shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache

from .decoding import upscale_factor
from .image import CaptionedImage


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


SMALLEST, LARGEST = 64, 4096  # of a resolution, as the node's own input has it


Size = tuple[int, int]


def parse_resolutions(text: str) -> list[int]:
    """ "768, 1024" -> [768, 1024]; commas, semicolons and spaces part them.

    Raises:
        ValueError: a part is no whole number, or out of range.
    """
    found = []
    for part in re.split(r"[\s,;]+", text.strip()):
        if not part:
            continue
        if not re.fullmatch(r"[0-9]{1,6}", part) or not SMALLEST <= int(part) <= LARGEST:
            raise ValueError(
                f"More resolutions are whole numbers from {SMALLEST} to {LARGEST} with commas in between, such as "
                f'"768, 1024", but one is "{part}".'
            )
        found.append(int(part))
    return list(dict.fromkeys(found))


def bucket_sizes(
    picture: CaptionedImage, resolution: int, more: Sequence[int], multiple: int
) -> tuple[list[Size], list[int]]:
    """The (width, height) in which a picture is shown, first that of the resolution; and what it is too small for.

    more: further resolutions; one that would draw the picture larger than it is, is left out. multiple: of which all
    sides must be.
    """
    sizes = [bucket_for(picture.width, picture.height, resolution, bucket_step(resolution, multiple))]
    too_large = []
    for each in more:
        size = bucket_for(picture.width, picture.height, each, bucket_step(each, multiple))
        if size in sizes:
            continue
        if upscale_factor(picture, size) > 1:
            too_large.append(each)
        else:
            sizes.append(size)
    return sizes, too_large
