"""The report of a training: its trajectory, and the spectrum of what came out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch

from ..adapter import Adapter, RankReport, Restart, Setting, TruncationLoss
from ..config import TrainConfig
from ..method import Rule, delta_singular_values, rank_rule
from .progress import Progress


def make_report(
    config: TrainConfig, facts: Mapping[str, Setting], progress: Progress, adapter: Adapter, cuts: list[TruncationLoss]
) -> RankReport:
    """facts: what is to be told besides the settings. progress: of the pass that gave the adapter."""
    layers = adapter.layers.items()
    spectrum = {name: delta_singular_values(*layer.factors(), layer.scale).tolist() for name, layer in layers}
    rule = _signal_rule(config, progress.restarts)
    signal = {name: rule(torch.tensor(values)) for name, values in spectrum.items()}
    settings = {**asdict(config), **facts}
    return RankReport(
        settings, list(progress.losses), list(progress.validation), list(progress.restarts), spectrum, signal, cuts
    )


def _signal_rule(config: TrainConfig, restarts: Sequence[Restart]) -> Rule:
    """Signal is as many components as reach the last threshold, or 95 % of the energy.

    Eq. 3 would count one fewer, and an adapter that was cut to it would lose that one.
    """
    if restarts and math.isnan(restarts[-1].threshold):
        return rank_rule("noise_floor")
    threshold = max(restarts[-1].threshold, 1e-6) if restarts else 0.95
    return rank_rule("sum" if restarts and config.measure == "sum" else "energy", threshold)
