"""Buckets: the sizes that images are scaled to, of about equal area and of many aspect ratios."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache

from .decoding import upscale_factor
from .image import CaptionedImage

MIN_RESOLUTION = 64  # as in the resolution input of the node
MAX_RESOLUTION = 4096

Size = tuple[int, int]  # (width, height) in pixels


def bucket_step(resolution: int, multiple: int = 8) -> int:
    """Return the grid of bucket sides: about resolution / 8, a power of two from 16 to 64.

    Args:
        resolution: side of a square bucket in pixels.
        multiple: what the step must be a multiple of, for example the VAE's compression.
    """
    power = 1 << (max(resolution // 8, 1).bit_length() - 1)
    return math.lcm(min(64, max(16, power)), multiple)


def bucket_for(width: int, height: int, resolution: int, step: int | None = None) -> Size:
    """Return the bucket whose aspect ratio is nearest to an image's.

    Args:
        width: of the image, in pixels.
        height: of the image, in pixels.
        resolution: the bucket has about resolution² pixels and is at most 4 : 1.
        step: what both sides are multiples of; bucket_step if None.

    Raises:
        ValueError: the step exceeds the resolution.
    """
    step = bucket_step(resolution) if step is None else step
    if step > resolution:
        raise ValueError(
            f"Resolution {resolution} is too small: image sides have to be multiples of {step} pixels here. "
            f"Raise the resolution to {step} or more."
        )
    log_ratio = math.log(width / height)
    area = resolution * resolution

    def distance(size: Size) -> tuple[float, int, Size]:
        return round(abs(math.log(size[0] / size[1]) - log_ratio), 9), abs(size[0] * size[1] - area), size

    return min(_buckets(resolution, step), key=distance)


@lru_cache(maxsize=16)
def _buckets(resolution: int, step: int) -> tuple[Size, ...]:
    """All sizes on the grid from 1 : 4 to 4 : 1 whose area is within an eighth of resolution²."""
    area = resolution * resolution
    square = math.floor(resolution / step + 0.5) * step
    sizes = {(square, square)}
    for long in range(square + step, 2 * square + 1, step):
        below = max(area // (long * step), 1) * step
        fitting = [short for short in (below, below + step) if abs(long * short / area - 1) <= 1 / 8]
        for short in fitting or [below]:
            sizes |= {(long, short), (short, long)}
    return tuple(sorted(sizes))


def parse_resolutions(text: str) -> list[int]:
    """Parse "768, 1024" to [768, 1024], without duplicates; commas, semicolons and spaces separate.

    Raises:
        ValueError: a part is not a whole number or is out of range.
    """
    found = []
    for part in re.split(r"[\s,;]+", text.strip()):
        if not part:
            continue
        if not re.fullmatch(r"[0-9]{1,6}", part) or not MIN_RESOLUTION <= int(part) <= MAX_RESOLUTION:
            raise ValueError(
                f"more_resolutions has to be whole numbers from {MIN_RESOLUTION} to {MAX_RESOLUTION}, separated by "
                f'commas, such as "768, 1024", but one is "{part[:20]}".'
            )
        found.append(int(part))
    return list(dict.fromkeys(found))


def bucket_sizes(
    image: CaptionedImage, resolution: int, further: Sequence[int], multiple: int
) -> tuple[list[Size], list[int]]:
    """Choose the sizes in which an image is shown.

    Args:
        image: the image; only its size is used.
        resolution: the main resolution, which even a smaller image is scaled up to.
        further: more resolutions; those that would need scaling up are skipped.
        multiple: what all sides must be multiples of.

    Returns:
        The sizes, first that of the main resolution, and the further resolutions that the image is too small for.
    """
    sizes = [bucket_for(image.width, image.height, resolution, bucket_step(resolution, multiple))]
    too_large = []
    for each in further:
        size = bucket_for(image.width, image.height, each, bucket_step(each, multiple))
        if size in sizes:
            continue
        if upscale_factor(image, size) > 1:
            too_large.append(each)
        else:
            sizes.append(size)
    return sizes, too_large
