r"""Patterns on layer names: which layers are trained, and with which rank.

A pattern is a part of a name, such as double_blocks.7., or, if it contains one of ^ $ * + ? ( ) [ ] { } | \, a regular
expression that is searched for in the name. A text has one pattern per line; empty lines are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable

_SPECIAL = set("^$*+?()[]{}|\\")  # without the full stop, which is part of most names


def pattern_lines(text: str) -> list[str]:
    """Return the patterns of a text, one per line."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def pattern_matcher(pattern: str, prefix: str = "") -> Callable[[str], bool]:
    """Return the function that says whether a layer name matches the pattern.

    Args:
        pattern: a part of a name or a regular expression.
        prefix: of the names; a regular expression may match with or without it.

    Raises:
        ValueError: the regular expression is invalid.
    """
    if not _SPECIAL & set(pattern):
        return lambda name: pattern in name
    try:
        expression = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"The layer pattern '{pattern}' is not a valid regular expression: {error}.") from error
    return lambda name: bool(expression.search(name) or expression.search(name.removeprefix(prefix)))


def select_layers(names: Iterable[str], include: str, exclude: str, prefix: str = "") -> list[str]:
    """Select layers by name.

    Args:
        names: of all layers that could be trained.
        include: patterns, of which a name must match one; empty includes all names.
        exclude: patterns, of which a name must match none.
        prefix: of the names.

    Returns:
        The selected names, in their order.

    Raises:
        ValueError: a pattern matches no name, or no name is left.
    """
    names = list(names)
    included = set(names)
    if pattern_lines(include):
        included = _matching_names(names, pattern_lines(include), "include_layers", prefix)
    selected = included - _matching_names(names, pattern_lines(exclude), "exclude_layers", prefix)
    if names and not selected:
        raise ValueError("include_layers and exclude_layers leave no layer to train. Remove some of their lines.")
    return [name for name in names if name in selected]


def rank_overrides(names: Collection[str], text: str, prefix: str = "") -> dict[str, int]:
    """Return the ranks of the layers that have one of their own.

    Args:
        names: of the layers that are trained.
        text: lines of pattern=rank. If several match a layer, the last one applies.
        prefix: of the names.

    Raises:
        ValueError: a line has another form, or its pattern matches no name.
    """
    ranks: dict[str, int] = {}
    for pattern, rank in parse_ranks(text):
        ranks |= dict.fromkeys(_matching_names(names, [pattern], "layer_ranks", prefix), rank)
    return ranks


def parse_ranks(text: str) -> list[tuple[str, int]]:
    """Return the pairs of pattern and rank of lines of pattern=rank.

    Raises:
        ValueError: a line has another form.
    """
    pairs = []
    for line in pattern_lines(text):
        pattern, _, rank = line.rpartition("=")
        if not pattern.strip() or not rank.strip().isdecimal() or int(rank) < 1:
            raise ValueError(f"A line of layer_ranks must be pattern=rank with a rank of 1 or more, but is '{line}'.")
        pairs.append((pattern.strip(), int(rank)))
    return pairs


def _matching_names(names: Iterable[str], patterns: Iterable[str], setting: str, prefix: str) -> set[str]:
    """The names that match any of the patterns. Raises ValueError, with the setting, if a pattern matches none."""
    names = list(names)
    found: set[str] = set()
    for pattern in patterns:
        matching = set(filter(pattern_matcher(pattern, prefix), names))
        if names and not matching:
            raise ValueError(
                f"No layer that would be trained has '{pattern}' ({setting}) in its name. Names look like '{names[0]}' "
                f"and '{names[-1]}'. Correct the line, or set layers to 'all', which trains the most layers."
            )
        found |= matching
    return found
