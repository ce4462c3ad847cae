"""The smallest adapter that is as good as the whole one, found by truncating it and measuring held-out images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from ..adapter import (
    Adapter,
    SvdLayer,
    TrainingFacts,
    Truncation,
    TruncationLoss,
    decompose,
    ranks_by_rule,
    truncate_to_ranks,
)
from ..method import rank_rule

WHOLE = Truncation("whole")
USED_RANKS = Truncation("energy", 0.98)  # of a training without held-out images; what it leaves out is hardly seen

_BYTES = 2  # per element in a file as Save AC-LoRA writes it unless asked otherwise
_ENERGIES = (0.8, 0.9, 0.95, 0.99)
_TOLERANCE = 0.01  # of the best loss: with few images the noise alone would let through too much


def truncated(adapter: Adapter, truncation: Truncation, layers: dict[str, SvdLayer] | None = None) -> Adapter:
    """Return a truncated adapter. layers: its decomposition, where that is known."""
    if truncation == WHOLE:
        return adapter
    layers = layers or decompose(adapter)
    return truncate_to_ranks(adapter, layers, ranks_of(truncation, layers))[0]


def used_ranks_facts(facts: TrainingFacts, whole: Adapter, adapter: Adapter) -> TrainingFacts:
    """Return the facts with what the truncation of an adapter to its used ranks did."""
    size = sum(_BYTES * (layer.lora_down.numel() + layer.lora_up.numel()) for layer in adapter.layers.values())
    return replace(facts, rank_before=_mean_rank(whole), rank_after=_mean_rank(adapter), truncated_size=size)


def _mean_rank(adapter: Adapter) -> float:
    return sum(layer.rank for layer in adapter.layers.values()) / len(adapter.layers)


def ranks_of(truncation: Truncation, layers: dict[str, SvdLayer]) -> dict[str, int]:
    """Return the rank of each layer after a truncation."""
    if truncation.kind == "fixed" or truncation.kind == "energy":
        return ranks_by_rule(layers, rank_rule(truncation.kind, truncation.value))
    return {name: layer.layer.rank for name, layer in layers.items()}


def smallest_truncation(
    adapter: Adapter, losses_of: Callable[[Adapter], Tensor], should_stop: Callable[[], bool] = lambda: False
) -> tuple[Truncation, list[TruncationLoss]]:
    """Return the smallest truncation whose loss is within the noise of the best, and the loss of every one tried.

    The noise of a difference is its standard error over images and noise levels. A difference above 1 % of the best
    loss is never taken for noise.

    Args:
        adapter: the whole adapter.
        losses_of: adapter -> its losses, (images × noise levels,), always in one order.
        should_stop: asked before each measurement; True leaves the adapter whole.
    """
    layers = decompose(adapter)
    tried: dict[Truncation, Tensor] = {}
    for truncation in _candidates(layers):
        if should_stop():
            return WHOLE, []
        tried[truncation] = losses_of(truncated(adapter, truncation, layers))
    best = min(tried.values(), key=_mean)
    rows = {truncation: _row(truncation, losses, best, layers) for truncation, losses in tried.items()}
    limit = _mean(best)
    good = [it for it, row in rows.items() if row.loss - limit <= min(row.error, _TOLERANCE * limit)]
    chosen = min(good, key=lambda it: rows[it].size) if good else WHOLE
    by_size = sorted(rows.items(), key=lambda item: item[1].size)
    return chosen, [replace(row, chosen=truncation == chosen) for truncation, row in by_size]


def _candidates(layers: dict[str, SvdLayer]) -> list[Truncation]:
    """Return truncations that differ: whole, to ranks 1, 2, 4, …, and to shares of the energy."""
    max_rank = max(len(layer.singular_values) for layer in layers.values())
    candidates = [WHOLE]
    candidates += [Truncation("fixed", 2**power) for power in range(math.ceil(math.log2(max_rank)))]
    candidates += [Truncation("energy", share) for share in _ENERGIES]
    different: dict[tuple[int, ...], Truncation] = {}
    for truncation in candidates:
        different.setdefault(tuple(ranks_of(truncation, layers).values()), truncation)
    return list(different.values())


def _row(truncation: Truncation, losses: Tensor, best: Tensor, layers: dict[str, SvdLayer]) -> TruncationLoss:
    ranks = ranks_of(truncation, layers)
    difference = losses - best
    error = float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
    size = _BYTES * sum(rank * layers[name].params_per_component for name, rank in ranks.items())
    return TruncationLoss(truncation, sum(ranks.values()) / len(ranks), size, _mean(losses), error, False)


def _mean(losses: Tensor) -> float:
    """Return the mean loss; infinite where it is not finite, so that such a truncation is never the best."""
    mean = float(losses.mean())
    return mean if math.isfinite(mean) else math.inf
