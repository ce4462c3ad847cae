"""Captions: finding and reading them, adding the trigger word, shuffling tags."""

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
    """The files of one image, found by name; none of them has been opened."""

    path: Path
    name: str  # path inside the scanned folder, with "/"
    caption: Path | None
    repeats: int
    mask: Path | None = None


def captions_by_stem(files: set[str]) -> dict[str, str]:
    """Map each stem to the name of its caption file; .txt takes precedence over .caption."""
    found: dict[str, str] = {}
    for wanted in CAPTION_SUFFIXES:
        for name in sorted(files):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() == wanted:
                found.setdefault(stem, name)
    return found


def read_caption(files: ImageFiles) -> str:
    """Read an image's caption with runs of whitespace collapsed; empty if it has none.

    Raises:
        ValueError: the file cannot be read or is not UTF-8.
    """
    if files.caption is None:
        return ""
    try:
        text = files.caption.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(
            f"The caption of {files.name} cannot be read ({error.strerror}). Check the file {files.caption.name}."
        ) from error
    except UnicodeDecodeError as error:
        raise _not_utf8(files.name, files.caption.name) from error
    if "\0" in text:  # UTF-16 without a byte order mark decodes as UTF-8, with a zero after each letter
        raise _not_utf8(files.name, files.caption.name)
    return " ".join(text.split())


def _not_utf8(image: str, caption: str) -> ValueError:
    return ValueError(
        f"The caption {caption} of {image} is not UTF-8 text: open it in an editor and save it again as UTF-8."
    )


def with_trigger(caption: str, trigger: str) -> str:
    """Put the trigger word in front of a caption that does not contain it as a whole word, in any case."""
    if not caption or not trigger:
        return caption or trigger
    if re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{trigger}, {caption}"


def shuffle_tags(caption: str, shuffles: int, kept_tags: int = 1) -> list[str]:
    """Return the caption and up to `shuffles` other orders of its comma-separated tags, without duplicates.

    The first `kept_tags` tags stay in place. The orders depend on the caption alone.
    """
    tags = [tag.strip() for tag in caption.split(",")]
    kept, moving = tags[:kept_tags], tags[kept_tags:]
    generator = random.Random(caption)
    orders = {tuple(moving): caption}
    wanted = 1 + min(shuffles, math.factorial(min(len(moving), 8)) - 1)
    # Repeated tags have fewer distinct orders than that, so the number of attempts is limited.
    for _ in range(20 * shuffles):
        if len(orders) >= wanted:
            break
        drawn = tuple(generator.sample(moving, len(moving)))
        orders.setdefault(drawn, ", ".join([*kept, *drawn]))
    return list(orders.values())
