"""The report of a training: its trajectory, and the spectrum of what came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch

from ..adapter import Adapter, RankReport, Restart, TrainingFacts, TruncationLoss
from ..config import TrainConfig
from ..method import Rule, delta_singular_values, rank_rule
from .progress import Progress


def make_report(
    config: TrainConfig, facts: TrainingFacts, progress: Progress, adapter: Adapter, cuts: list[TruncationLoss]
) -> RankReport:
    """progress: of the pass that gave the adapter."""
    layers = adapter.layers.items()
    spectrum = {name: delta_singular_values(*layer.factors(), layer.scale).tolist() for name, layer in layers}
    rule = _signal_rule(config, progress.restarts)
    signal = {name: rule(torch.tensor(values)) for name, values in spectrum.items()}
    return RankReport(
        settings=asdict(config),
        losses=list(progress.losses),
        validation=list(progress.validation),
        restarts=list(progress.restarts),
        spectrum=spectrum,
        signal=signal,
        truncations=cuts,
        facts=facts,
    )


def _signal_rule(config: TrainConfig, restarts: Sequence[Restart]) -> Rule:
    """Signal is as many components as reach the last threshold, or 95 % of the energy.

    Eq. 3 would count one fewer, and an adapter that was cut to it would lose that one.
    """
    if not restarts:
        return rank_rule("energy", 0.95)
    threshold = restarts[-1].threshold
    if threshold is None:
        return rank_rule("noise_floor")
    return rank_rule("sum" if config.measure == "sum" else "energy", max(threshold, 1e-6))
