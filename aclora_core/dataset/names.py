"""File names that belong together, whatever their Unicode form and case."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


def folded(name: str) -> str:
    """Return a name without the differences of Unicode form (macOS writes é as two characters) and of case."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


class ByName(Generic[T]):
    """Items by name; the exact name takes precedence over one of another Unicode form or case.

    Args:
        items: names and what they stand for; of several items with one name the first counts.
    """

    def __init__(self, items: Iterable[tuple[str, T]]) -> None:
        self._exact: dict[str, T] = {}
        self._folded: dict[str, T] = {}
        for name, item in items:
            self._exact.setdefault(name, item)
            self._folded.setdefault(folded(name), item)

    def get(self, name: str) -> T | None:
        """Return the item of this name, or None."""
        found = self._exact.get(name)
        return self._folded.get(folded(name)) if found is None else found
