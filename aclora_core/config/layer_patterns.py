r"""Patterns on the names of layers: which are trained, and with which rank.

A line is a part of a name, such as double_blocks.7., or, where it has one of ^ $ * + ? ( ) [ ] { } | \, a regular
expression that is searched in the name. Empty lines do not count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable

_SPECIAL = set("^$*+?()[]{}|\\")  # the full stop is part of most names


def pattern_lines(text: str) -> list[str]:
    """The patterns of a text, one a line."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def pattern_matcher(pattern: str, prefix: str = "") -> Callable[[str], bool]:
    """Whether a name has the pattern, with the prefix before it or without.

    Raises:
        ValueError: it looks like a regular expression and is none.
    """
    if not _SPECIAL & set(pattern):
        return lambda name: pattern in name
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"The layer pattern '{pattern}' is no regular expression: {error}.") from error
    return lambda name: bool(expression.search(name) or expression.search(name.removeprefix(prefix)))


def select_layers(names: Iterable[str], include: str, exclude: str, prefix: str = "") -> list[str]:
    """Of these names those that have one of the patterns to include (all where there are none), and none to exclude.

    Raises:
        ValueError: a pattern is in no name, or no name is left.
    """
    names = list(names)
    wanted = _having(names, pattern_lines(include), "include_layers", prefix) if pattern_lines(include) else set(names)
    chosen = wanted - _having(names, pattern_lines(exclude), "exclude_layers", prefix)
    if names and not chosen:
        raise ValueError("include_layers and exclude_layers leave no layer to train. Take some of their lines out.")
    return [name for name in names if name in chosen]


def rank_overrides(names: Collection[str], text: str, prefix: str = "") -> dict[str, int]:
    """The ranks that lines of pattern=rank give to some of these names; of several lines the last counts.

    Raises:
        ValueError: a line is written otherwise, or its pattern is in no name.
    """
    found: dict[str, int] = {}
    for pattern, rank in parse_ranks(text):
        found |= dict.fromkeys(_having(names, [pattern], "layer_ranks", prefix), rank)
    return found


def parse_ranks(text: str) -> list[tuple[str, int]]:
    """The pairs of lines of pattern=rank. Raises ValueError for a line that is written otherwise."""
    pairs = []
    for line in pattern_lines(text):
        pattern, _, rank = line.rpartition("=")
        if not pattern.strip() or not rank.strip().isdecimal() or int(rank) < 1:
            raise ValueError(f"A line of layer_ranks must be pattern=rank with a rank of 1 or more, but is '{line}'.")
        pairs.append((pattern.strip(), int(rank)))
    return pairs


def _having(names: Iterable[str], patterns: Iterable[str], kind: str, prefix: str) -> set[str]:
    names = list(names)
    found: set[str] = set()
    for pattern in patterns:
        matching = set(filter(pattern_matcher(pattern, prefix), names))
        if names and not matching:
            raise ValueError(
                f"No layer that would be trained has '{pattern}' ({kind}) in its name. Names look like '{names[0]}' "
                f"and '{names[-1]}'. The setting layers says which there are; with 'all' they are the most."
            )
        found |= matching
    return found
