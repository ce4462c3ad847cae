"""What sentences for the user are made of."""

from __future__ import annotations

from collections.abc import Sequence


def counted(number: int, noun: str) -> str:
    """A number of things: 1 picture, 2 pictures."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def some(names: Sequence[object], most: int = 3) -> str:
    """The first names of many, and how many more there are."""
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def reason(error: Exception) -> str:
    """The first line of an error, or its kind where it has no words."""
    return str(error).split("\n")[0] or type(error).__name__
