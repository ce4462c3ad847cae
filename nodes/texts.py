"""Checks of words and prompts that users write into a node."""

from __future__ import annotations

MAX_LENGTH = 10_000  # characters, as of a caption


def check_text(name: str, text: str) -> None:
    """Check that a text can be encoded and written into files.

    Args:
        name: of the node's input.
        text: what is written there.

    Raises:
        ValueError: it is too long, or holds half of a character.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"{name} has {len(text):,} characters, but at most {MAX_LENGTH:,} are allowed. Shorten it.")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"{name} holds half of a character (a lone surrogate). Write it again.")
