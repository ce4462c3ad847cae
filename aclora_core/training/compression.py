"""The smallest adapter that is as good as the whole one, found by cutting it and measuring on held-out pictures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from ..adapter import Adapter, BalancedLayer, CutLoss, balance, cut_to_ranks, ranks_by_rule
from ..method import rank_rule

_BYTES = 2  # of a number in a file as Save AC-LoRA writes it unless told otherwise


_ENERGIES = (0.8, 0.9, 0.95, 0.99)


_TOLERANCE = 0.01  # of the best loss: with few pictures the noise alone would let through too much


@dataclass(frozen=True)
class Cut:
    """A way to cut an adapter. Without a rule it stays whole."""

    name: str
    rule: str | None = None
    value: float = 0.0

    def ranks(self, balanced: dict[str, BalancedLayer]) -> dict[str, int]:
        """The rank of each layer."""
        if self.rule is None:
            return {name: layer.layer.rank for name, layer in balanced.items()}
        return ranks_by_rule(balanced, rank_rule(self.rule, self.value))  # type: ignore[arg-type]

    def apply(self, adapter: Adapter, balanced: dict[str, BalancedLayer] | None = None) -> Adapter:
        """The adapter cut so."""
        if self.rule is None:
            return adapter
        balanced = balanced or balance(adapter)
        return cut_to_ranks(adapter, balanced, self.ranks(balanced))[0]


WHOLE = Cut("whole")


def smallest_cut(
    adapter: Adapter, losses_of: Callable[[Adapter], Tensor], step_back: Callable[[], bool] = lambda: False
) -> tuple[Cut, list[CutLoss]]:
    """The smallest cut whose loss is within the noise of the best, and what every cut that was tried loses.

    losses_of: an adapter -> its losses, one for each held-out picture and noise level, in one order. The noise of a
    difference is its standard error over these; a difference above 1 % of the best loss is never taken for noise.
    step_back: asked before each measurement; True leaves the adapter whole.
    """
    balanced = balance(adapter)
    tried: dict[Cut, tuple[dict[str, int], Tensor]] = {}
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


def _candidates(balanced: dict[str, BalancedLayer]) -> list[Cut]:
    """Cuts that differ: whole, to ranks 1, 2, 4, …, and to shares of the energy."""
    most = max(len(layer.singular_values) for layer in balanced.values())
    cuts = [
        WHOLE,
        *(Cut(f"rank {2**power}", "fixed", 2**power) for power in range(math.ceil(math.log2(most)))),
        *(Cut(f"energy {share:.0%}", "energy", share) for share in _ENERGIES),
    ]
    different: dict[tuple[int, ...], Cut] = {}
    for cut in cuts:
        different.setdefault(tuple(cut.ranks(balanced).values()), cut)
    return list(different.values())


def _row(cut: Cut, ranks: dict[str, int], losses: Tensor, best: Tensor, balanced: dict[str, BalancedLayer]) -> CutLoss:
    difference = losses - best
    error = float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
    size = _BYTES * sum(rank * balanced[name].component_numbers for name, rank in ranks.items())
    return CutLoss(cut.name, sum(ranks.values()) / len(ranks), size, _mean(losses), error, False)


def _mean(losses: Tensor) -> float:
    """Infinite where the loss is no number, so that such a cut is never the best."""
    mean = float(losses.mean())
    return mean if math.isfinite(mean) else math.inf
