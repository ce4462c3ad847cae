"""The sizes in which a picture is shown: that of the resolution, and further ones that are not larger than it is."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .buckets import bucket_for, bucket_step
from .images import Picture, enlargement

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
                f'More resolutions are whole numbers from {SMALLEST} to {LARGEST} with commas in between, such as '
                f'"768, 1024", but one is "{part}".'
            )
        found.append(int(part))
    return list(dict.fromkeys(found))


def sizes_of(picture: Picture, resolution: int, more: Sequence[int], multiple: int) -> tuple[list[Size], list[int]]:
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
        if enlargement(picture, size) > 1:
            too_large.append(each)
        else:
            sizes.append(size)
    return sizes, too_large
