"""The report of a training: its trajectory, and the spectrum and signal ranks of the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch

from ..adapter import Adapter, RankReport, Restart, TrainingFacts, TruncationLoss
from ..config import TrainConfig
from ..method import Rule, delta_singular_values, rank_rule
from .progress import Progress


def make_report(
    config: TrainConfig, facts: TrainingFacts, progress: Progress, adapter: Adapter, truncations: list[TruncationLoss]
) -> RankReport:
    """Return the report of a training.

    Args:
        config: of the training.
        facts: counts, times and notes.
        progress: of the pass that trained the adapter.
        adapter: as it is returned.
        truncations: those that were tried on held-out images, in their order.
    """
    rule = _signal_rule(config, progress.restarts)
    spectrum: dict[str, list[float]] = {}
    signal: dict[str, int] = {}
    for name, layer in adapter.layers.items():
        spectrum[name] = delta_singular_values(*layer.factors(), layer.scale).tolist()
        signal[name] = rule(torch.tensor(spectrum[name]))
    return RankReport(
        settings=asdict(config),
        losses=list(progress.losses),
        validation=list(progress.validation),
        restarts=list(progress.restarts),
        spectrum=spectrum,
        signal=signal,
        truncations=truncations,
        facts=facts,
        fit=list(progress.fit),
    )


def _signal_rule(config: TrainConfig, restarts: Sequence[Restart]) -> Rule:
    """Return the rule for signal ranks: the smallest rank that reaches the last threshold, or 95 % of the energy.

    AC-LoRA Eq. 3 counts one component fewer; an adapter truncated to that rank would lose it.
    """
    if not restarts:
        return rank_rule("energy", 0.95)
    threshold = restarts[-1].threshold
    if threshold == "noise floor":
        return rank_rule("noise_floor")
    return rank_rule("sum" if config.measure == "sum" else "energy", max(threshold, 1e-6))
