"""What the dataset node reports about captions and about folders that look like repeats, in sentences."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from ...aclora_core.dataset import CaptionedImage, ignored_repeats
from ...aclora_core.text import count_noun, name_list

_CHOICE = re.compile(r"\{[^{}]*\|[^{}]*\}")  # {red|blue}, of which wildcards draw one
_PROMPT_SYNTAX = re.compile(r"\([^()]*:\s*[0-9]*\.?[0-9]+\)|(?<!\S)embedding:\S")  # (word:1.3), embedding:name


def caption_remarks(images: Sequence[CaptionedImage], noun: str, advice: str, prompt_syntax: bool = False) -> list[str]:
    """Return what may be unexpected about the captions of a folder.

    Args:
        images: of the folder.
        noun: for one of them.
        advice: what to do where there is neither a caption nor a trigger word.
        prompt_syntax: whether captions are prompts.
    """
    lines = _missing_captions(images, noun, advice)
    several = [image.name for image in images if image.other_captions]
    choice = _with_caption(images, _CHOICE.search)
    syntax = [] if prompt_syntax else _with_caption(images, _PROMPT_SYNTAX.search)
    found = [
        (several, "with captions on several lines, of which each epoch shows one"),
        (choice, "with a choice such as {a|b} in the caption, learned literally; write one caption per line instead"),
        (syntax, "with (word:1.3) or embedding:name in the caption, learned as text; prompt_syntax would change that"),
    ]
    return lines + [f"{count_noun(len(names), noun)} {text}: {name_list(names)}." for names, text in found if names]


def repeat_remarks(images: Iterable[CaptionedImage]) -> list[str]:
    """Return a sentence for each folder that seems to ask for repeats but counts once."""
    lines: dict[str, None] = {}
    for image in images:
        subfolder = image.name.rpartition("/")[0]
        name = subfolder or image.path.parent.name
        repeats = ignored_repeats(name, bool(subfolder))
        if repeats and subfolder:
            lines[f'The subfolder "{name}" counts once. To repeat it {repeats} times, name it {repeats}_name.'] = None
        elif repeats:
            lines[f'The folder "{name}" counts once: repeats are for subfolders. Choose the folder above it.'] = None
    return list(lines)


def _missing_captions(images: Sequence[CaptionedImage], noun: str, advice: str) -> list[str]:
    missing = [image for image in images if not image.has_caption]
    if not missing:
        return []
    has_trigger = any(image.caption for image in missing)
    if has_trigger and len(missing) == len(images) > 1:
        return [f"No {noun} has a caption, so all are learned as the trigger word alone."]
    effect = ", so learned as the trigger word alone" if has_trigger else f"; {advice}"
    names = name_list([image.name for image in missing])
    return [f"{count_noun(len(missing), noun)} without a caption{effect}: {names}."]


def _with_caption(images: Iterable[CaptionedImage], found: Callable[[str], object]) -> list[str]:
    return [image.name for image in images if any(map(found, (image.caption, *image.other_captions)))]
