"""Captions: reading them, the trigger word, shuffling tags."""

from __future__ import annotations

import math
import os
import random
import re
from dataclasses import dataclass
from pathlib import Path

CAPTION_SUFFIXES = (".txt", ".caption")  # the first that exists is read


@dataclass(frozen=True)
class ImageFiles:
    path: Path
    name: str
    caption: Path | None
    repeats: int
    mask: Path | None = None


def captions_by_stem(files: set[str]) -> dict[str, str]:
    """Stem -> name of the caption file, .txt before .caption."""
    found: dict[str, str] = {}
    for wanted in CAPTION_SUFFIXES:
        for name in sorted(files):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() == wanted:
                found.setdefault(stem, name)
    return found


def read_caption(entry: ImageFiles) -> str:
    if entry.caption is None:
        return ""
    try:
        text = entry.caption.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"The caption of {entry.name} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(entry)) from error
    if "\0" in text:  # UTF-16 without a mark at its start decodes, but with a zero after each letter
        raise ValueError(_not_utf8(entry))
    return " ".join(text.split())


def _not_utf8(entry: ImageFiles) -> str:
    name = entry.caption.name if entry.caption else ""
    return f"The caption {name} of {entry.name} is not UTF-8 text: open it in an editor and save it again as UTF-8."


def with_trigger(caption: str, trigger: str) -> str:
    if not caption or not trigger:
        return caption or trigger
    if re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{trigger}, {caption}"


def shuffle_tags(caption: str, shuffles: int, kept_tags: int = 1) -> list[str]:
    """The caption itself, and up to so many different orders of its tags."""
    tags = [tag.strip() for tag in caption.split(",")]
    kept, moving = tags[:kept_tags], tags[kept_tags:]
    generator = random.Random(caption)
    orders = {tuple(moving): caption}
    wanted = 1 + min(shuffles, math.factorial(min(len(moving), 8)) - 1)
    # Equal tags have fewer orders than that, so the attempts are counted.
    for _ in range(20 * shuffles):
        if len(orders) >= wanted:
            break
        drawn = tuple(generator.sample(moving, len(moving)))
        orders.setdefault(drawn, ", ".join([*kept, *drawn]))
    return list(orders.values())
