"""Captions of different lengths in one batch, where the host itself joins them without changing what comes out.

Attention to the same words twice over is attention to them once: the shares stay. So the host repeats the shorter of
two captions until both have one length (comfy.conds.CONDCrossAttn), for networks whose words are only looked at.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from comfy.conds import CONDCrossAttn

_MOST = 4  # times that a caption may be repeated, as in the host; more would cost more than it gains

Lengths = Mapping[Hashable, Mapping[int, int]]


def common_lengths(conditions: Iterable[Mapping[str, Any]]) -> Lengths:
    """To which length each one is repeated, for every kind of condition that may be."""
    found: dict[Hashable, set[int]] = {}
    for condition in conditions:
        for name, cond in condition.items():
            if isinstance(cond, CONDCrossAttn):
                found.setdefault(_kind(name, cond), set()).add(cond.cond.shape[1])
    return {kind: _targets(lengths) for kind, lengths in found.items()}


def repeated(condition: Mapping[str, Any], lengths: Lengths) -> dict[str, Any]:
    """A condition in its common length."""
    return {name: _repeated(name, cond, lengths) for name, cond in condition.items()}


def _repeated(name: str, cond: Any, lengths: Lengths) -> Any:
    length = cond.cond.shape[1] if isinstance(cond, CONDCrossAttn) else 0
    target = lengths[_kind(name, cond)][length] if length else 0
    return cond._copy_with(cond.cond.repeat(1, target // length, 1)) if target != length else cond


def _kind(name: str, cond: Any) -> Hashable:
    rows, _, width = cond.cond.shape
    return name, rows, width


def _targets(lengths: Iterable[int]) -> dict[int, int]:
    """The shorter ones first, as many together as can be."""
    targets: dict[int, int] = {}
    together: list[int] = []
    for length in sorted(lengths):
        if math.lcm(length, *together) > _MOST * min([length, *together]):
            together = []
        together.append(length)
        targets |= dict.fromkeys(together, math.lcm(*together))
    return targets
