"""Augmentation: mirrored, resized, tag-shuffled and caption-free variants of an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .tags import shuffle_tags


@dataclass(frozen=True)
class Variant:
    """One way of showing a captioned image."""

    caption: str
    mirrored: bool = False
    size_index: int = 0  # into the sizes of the image


def variants(
    caption: str,
    flip: bool = False,
    shuffles: int = 0,
    kept_tags: int = 1,
    dropout: float = 0.0,
    sizes: int = 1,
    others: Sequence[str] = (),
    trigger: str = "",
) -> list[Variant]:
    """List the variants of an image; in each epoch training draws one of them, all with equal probability.

    Args:
        caption: the image's caption. The same caption always gets the same tag orders.
        flip: whether each caption also comes with the mirrored image.
        shuffles: the number of further tag orders of each caption; fewer if there are not as many. Tags are separated
            by commas.
        kept_tags: the number of tags that stay at the front, the trigger word first.
        dropout: approximate fraction of variants whose caption is empty; the list is as long as that takes.
        sizes: the number of sizes in which each variant comes.
        others: the image's further captions. Each comes about as often as the first.
        trigger: the trigger word, which kept_tags keeps in front wherever it stands.

    Returns:
        The variants, first the image as it is.

    Raises:
        ValueError: dropout is not in 0 … 0.5.
    """
    if not 0.0 <= dropout <= 0.5:
        raise ValueError(f"The caption dropout is {dropout}. Set a fraction from 0 to 0.5.")
    views = []
    for size_index in range(sizes):
        views.append((False, size_index))
        if flip:
            views.append((True, size_index))
    captioned = []
    for text in _evenly([shuffle_tags(each, shuffles, kept_tags, trigger) for each in (caption, *others)]):
        captioned += [Variant(text, mirrored, size_index) for mirrored, size_index in views]
    if dropout == 0.0 or not caption:
        return captioned
    odds = dropout / (1.0 - dropout)  # of a variant without a caption to one with it
    # Every view has to lose its caption at least once, so the captioned variants may have to come several times.
    copies = math.ceil(round(len(views) / (len(captioned) * odds), 9))
    empty = round(copies * len(captioned) * odds / len(views))
    uncaptioned = [Variant("", mirrored, size_index) for mirrored, size_index in views]
    return captioned * copies + uncaptioned * empty


def _evenly(orders: Sequence[list[str]]) -> list[str]:
    """The orders of all captions, repeated so that captions with few orders come about as often as the others."""
    most = max(len(own) for own in orders)
    return [text for own in orders for text in own * round(most / len(own))]
