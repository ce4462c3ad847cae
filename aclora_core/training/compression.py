"""The smallest adapter that is as good as the whole one, found by cutting it and measuring on held-out pictures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from ..adapter import Adapter, SvdLayer, Truncation, TruncationLoss, decompose, ranks_by_rule, truncate_to_ranks
from ..method import rank_rule

_BYTES = 2  # of a number in a file as Save AC-LoRA writes it unless told otherwise


_ENERGIES = (0.8, 0.9, 0.95, 0.99)


_TOLERANCE = 0.01  # of the best loss: with few pictures the noise alone would let through too much


@dataclass(frozen=True)
class TruncationRule:
    """A way to cut an adapter. Without a rule it stays whole."""

    name: str
    rule: Literal["fixed", "energy"] | None = None
    value: float = 0.0

    @property
    def truncation(self) -> Truncation:
        """The rule in a report."""
        return Truncation("whole") if self.rule is None else Truncation(self.rule, self.value)

    def ranks(self, balanced: dict[str, SvdLayer]) -> dict[str, int]:
        """The rank of each layer."""
        if self.rule is None:
            return {name: layer.layer.rank for name, layer in balanced.items()}
        return ranks_by_rule(balanced, rank_rule(self.rule, self.value))

    def apply(self, adapter: Adapter, balanced: dict[str, SvdLayer] | None = None) -> Adapter:
        """The adapter cut so."""
        if self.rule is None:
            return adapter
        balanced = balanced or decompose(adapter)
        return truncate_to_ranks(adapter, balanced, self.ranks(balanced))[0]


WHOLE = TruncationRule("whole")


def smallest_truncation(
    adapter: Adapter, losses_of: Callable[[Adapter], Tensor], step_back: Callable[[], bool] = lambda: False
) -> tuple[TruncationRule, list[TruncationLoss]]:
    """The smallest cut whose loss is within the noise of the best, and what every cut that was tried loses.

    losses_of: an adapter -> its losses, one for each held-out picture and noise level, in one order. The noise of a
    difference is its standard error over these; a difference above 1 % of the best loss is never taken for noise.
    step_back: asked before each measurement; True leaves the adapter whole.
    """
    balanced = decompose(adapter)
    tried: dict[TruncationRule, tuple[dict[str, int], Tensor]] = {}
    for cut in _candidates(balanced):
        if step_back():
            return WHOLE, []
        tried[cut] = cut.ranks(balanced), losses_of(cut.apply(adapter, balanced))
    best = min((losses for _, losses in tried.values()), key=lambda losses: _mean(losses))
    rows = {cut: _row(cut, ranks, losses, best, balanced) for cut, (ranks, losses) in tried.items()}
    limit = _mean(best)
    good = [cut for cut, row in rows.items() if row.loss - limit <= min(row.error, _TOLERANCE * limit)]
    chosen = min(good, key=lambda cut: rows[cut].size) if good else WHOLE
    return chosen, [replace(row, chosen=cut is chosen) for cut, row in sorted(rows.items(), key=lambda i: i[1].size)]


def _candidates(balanced: dict[str, SvdLayer]) -> list[TruncationRule]:
    """Cuts that differ: whole, to ranks 1, 2, 4, …, and to shares of the energy."""
    most = max(len(layer.singular_values) for layer in balanced.values())
    cuts = [
        WHOLE,
        *(TruncationRule(f"rank {2**power}", "fixed", 2**power) for power in range(math.ceil(math.log2(most)))),
        *(TruncationRule(f"energy {share:.0%}", "energy", share) for share in _ENERGIES),
    ]
    different: dict[tuple[int, ...], TruncationRule] = {}
    for cut in cuts:
        different.setdefault(tuple(cut.ranks(balanced).values()), cut)
    return list(different.values())


def _row(
    cut: TruncationRule, ranks: dict[str, int], losses: Tensor, best: Tensor, balanced: dict[str, SvdLayer]
) -> TruncationLoss:
    difference = losses - best
    error = float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
    size = _BYTES * sum(rank * balanced[name].params_per_component for name, rank in ranks.items())
    return TruncationLoss(cut.truncation, sum(ranks.values()) / len(ranks), size, _mean(losses), error, False)


def _mean(losses: Tensor) -> float:
    """Infinite where the loss is no number, so that such a cut is never the best."""
    mean = float(losses.mean())
    return mean if math.isfinite(mean) else math.inf
