"""Other looks at one captioned picture: mirrored, in other sizes, with its tags in another order, without caption."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .captions import shuffle_tags


@dataclass(frozen=True)
class Variant:
    caption: str
    mirrored: bool = False
    size: int = 0  # the place of its size among those that the picture has


def variants(
    caption: str,
    flip: bool = False,
    shuffles: int = 0,
    kept_tags: int = 1,
    dropout: float = 0.0,
    sizes: int = 1,
) -> list[Variant]:
    """The variants of a picture, of which training picks one in each epoch, each as likely as the others.

    The first is the picture as it is. flip: each caption comes with the mirrored picture too. shuffles: so many other
    orders of the tags, which commas part, with the first `kept_tags` in place; fewer where there are not so many.
    dropout: about this share of all variants has an empty caption; there are as many variants as that takes. sizes:
    each of these comes in so many sizes.

    The same caption always gets the same orders.

    Raises:
        ValueError: dropout is not in 0 … 0.5.
    """
    if not 0.0 <= dropout <= 0.5:
        raise ValueError(f"The caption dropout is {dropout}. Set a share from 0 to 0.5.")
    views = [(side, size) for size in range(sizes) for side in ((False, True) if flip else (False,))]
    shown = [Variant(text, *view) for text in shuffle_tags(caption, shuffles, kept_tags) for view in views]
    if dropout == 0.0 or not caption:
        return shown
    odds = dropout / (1.0 - dropout)  # of a variant without a caption to one with it
    copies = math.ceil(round(len(views) / (len(shown) * odds), 9))
    empty = round(copies * len(shown) * odds / len(views))
    return shown * copies + [Variant("", *view) for view in views] * empty
