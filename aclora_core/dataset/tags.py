"""Tags of a caption: splitting it at commas, putting the trigger word in front, and other orders."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from itertools import accumulate

from .captions import clean_text

COMMAS = ",，、"  # that separate tags: the ASCII comma and those of Chinese and Japanese
_OPENING = {  # the bracket that each closing one belongs to
    ")": "(",
    "]": "[",
    "}": "{",
    "）": "（",
    "】": "【",
    "」": "「",
    "』": "『",
    "》": "《",
    "”": "“",
    '"': '"',
}


def split_tags(caption: str) -> list[str]:
    """Split a caption at its commas outside brackets and quotation marks; empty tags are left out."""
    tags, start = [], 0
    for position in _separators(caption):
        tags.append(caption[start:position].strip())
        start = position + 1
    tags.append(caption[start:].strip())
    return [tag for tag in tags if tag]


def clean_trigger(trigger: str) -> str:
    """Return a trigger word as people type it, without commas at its ends."""
    return clean_text(trigger).strip(f"{COMMAS} ")


def with_trigger(caption: str, trigger: str) -> str:
    """Put the trigger word in front of a caption, in any case.

    Where the trigger word is a tag of its own, or several, it is moved. Where it is a word within a tag or a sentence
    the caption stays as it is.
    """
    trigger = clean_trigger(trigger)
    if not caption or not trigger:
        return caption or trigger
    tags, words = split_tags(caption), split_tags(trigger)
    start = _find(tags, words)
    if start is None and _has_word(caption, trigger):
        return caption
    if start is None:
        return _joint(caption).join([trigger, caption])
    end = start + len(words)
    return caption if start == 0 else _joint(caption).join([*tags[start:end], *tags[:start], *tags[end:]])


def shuffle_tags(caption: str, shuffles: int, kept_tags: int = 1, trigger: str = "") -> list[str]:
    """Return the caption and up to `shuffles` other orders of its tags, without duplicates.

    The orders depend on the caption and the trigger word alone.

    Args:
        caption: tags separated by commas.
        shuffles: the number of other orders; fewer if there are not as many.
        kept_tags: how many of the first tags stay in front. The trigger word is the first of them wherever it stands,
            and counts once even if it has commas.
        trigger: the trigger word, if there is one.
    """
    joint = _joint(caption)
    tags, first = _with_trigger_as_one(split_tags(caption), clean_trigger(trigger), joint)
    in_front = [tags[first], *tags[:first], *tags[first + 1 :]] if first else tags
    kept, moving = in_front[:kept_tags], in_front[kept_tags:]
    generator = random.Random(caption)
    orders = {tuple(tags): caption}
    possible = math.factorial(min(len(moving), 8)) - (tags[: len(kept)] == kept)  # besides the caption itself
    # Repeated tags have fewer distinct orders than that, so the number of attempts is limited.
    for _ in range(20 * shuffles):
        if len(orders) > min(shuffles, possible):
            break
        order = [*kept, *generator.sample(moving, len(moving))]
        orders.setdefault(tuple(order), joint.join(order))
    return list(orders.values())


def _with_trigger_as_one(tags: list[str], trigger: str, joint: str) -> tuple[list[str], int]:
    """The tags, those that make up the trigger word joined, and the place of the one that holds it; else 0."""
    words = split_tags(trigger)
    start = _find(tags, words)
    if start is not None:
        end = start + len(words)
        return [*tags[:start], joint.join(tags[start:end]), *tags[end:]], start
    holding = (place for place, tag in enumerate(tags) if trigger and _has_word(tag, trigger))
    return tags, next(holding, 0)


def _find(tags: list[str], words: list[str]) -> int | None:
    """The place of a run of tags, in any case; None if it does not occur."""
    lower, wanted = [tag.casefold() for tag in tags], [word.casefold() for word in words]
    places = range(len(tags) - len(words) + 1) if words else range(0)
    return next((start for start in places if lower[start : start + len(words)] == wanted), None)


def _has_word(text: str, trigger: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", text, re.IGNORECASE) is not None


def _joint(caption: str) -> str:
    """What joins tags as this caption does: its first comma, with a space if that is the ASCII one."""
    comma = next((caption[position] for position in _separators(caption)), ",")
    return ", " if comma == "," else comma


def _separators(text: str) -> list[int]:
    """The positions of the commas outside brackets and quotation marks."""
    steps = [0] * (len(text) + 1)
    for start, end in _bracketed(text):
        steps[start] += 1
        steps[end] -= 1
    depths = list(accumulate(steps))
    return [position for position, char in enumerate(text) if char in COMMAS and depths[position] == 0]


def _bracketed(text: str) -> list[tuple[int, int]]:
    """The first and the last position of each pair of brackets; one without a partner, as in ":(", is none."""
    pairs: list[tuple[int, int]] = []
    opened: list[int] = []
    count: Counter[str] = Counter()  # of the brackets in `opened`
    for position, char in enumerate(text):
        opening = _OPENING.get(char)
        if opening and count[opening]:
            while opened:
                start = opened.pop()
                count[text[start]] -= 1
                if text[start] == opening:
                    pairs.append((start, position))
                    break
        elif _opens(text, position):
            opened.append(position)
            count[char] += 1
    return pairs


def _opens(text: str, position: int) -> bool:
    char = text[position]
    if char == '"':  # after a letter or a digit it closes, or stands for inches
        return not text[position - 1 : position].isalnum()
    return char in _OPENING.values()
