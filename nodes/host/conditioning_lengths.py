"""Captions of different lengths in one batch, repeated to a common length.

Cross-attention to repeated tokens gives the same output as to the tokens once, since the softmax weights are shared
evenly between the copies. ComfyUI repeats the shorter of two captions so (comfy.conds.CONDCrossAttn), for networks that
use the caption in cross-attention only. This module does the same for all captions of a training.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from comfy.conds import CONDCrossAttn

_MAX_REPEATS = 4  # of a caption, as in ComfyUI; more would cost more time than the larger batch saves

Lengths = Mapping[Hashable, Mapping[int, int]]  # for each kind of condition, the common length of each length


def common_lengths(conditions: Iterable[Mapping[str, Any]]) -> Lengths:
    """Return the length to which each condition is repeated, by its kind and its own length.

    Args:
        conditions: of each caption, the model's inputs by name; those for cross-attention may be repeated.
    """
    found: dict[Hashable, set[int]] = {}
    for condition in conditions:
        for name, cond in condition.items():
            if isinstance(cond, CONDCrossAttn):
                found.setdefault(_kind(name, cond), set()).add(cond.cond.shape[1])
    return {kind: _targets(lengths) for kind, lengths in found.items()}


def repeat_to_common_length(condition: Mapping[str, Any], lengths: Lengths) -> dict[str, Any]:
    """Return a condition whose parts for cross-attention are repeated to their common length."""
    return {name: _repeated(name, cond, lengths) for name, cond in condition.items()}


def _repeated(name: str, cond: Any, lengths: Lengths) -> Any:
    if not isinstance(cond, CONDCrossAttn):
        return cond
    length = cond.cond.shape[1]
    target = lengths.get(_kind(name, cond), {}).get(length, length)  # a prompt may have a length of its own
    return cond._copy_with(cond.cond.repeat(1, target // length, 1)) if target != length else cond


def _kind(name: str, cond: Any) -> Hashable:
    rows, _, width = cond.cond.shape
    return name, rows, width


def _targets(lengths: Iterable[int]) -> dict[int, int]:
    """Group lengths greedily, the shorter ones first, and map each to the least common multiple of its group."""
    targets: dict[int, int] = {}
    group: list[int] = []
    for length in sorted(lengths):
        if math.lcm(length, *group) > _MAX_REPEATS * min([length, *group]):
            group = []
        group.append(length)
        targets |= dict.fromkeys(group, math.lcm(*group))
    return targets
