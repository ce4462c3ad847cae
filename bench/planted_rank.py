"""Is the reported signal rank the true one? Layers whose true update has rank 3 are fitted to noisy data.

    python -m bench.planted_rank [--seeds 40]

A layer learns (W0 + D) x from noisy examples, with D of rank 3, as a LoRA of rank 16 with AdamW and restarts. The three
singular values of D are 3, 2.5 and 2 times the edge: the largest singular value that noise alone gives the
least-squares fit, noise · (√out + √in) / √examples. Each seed is one layer of each shape. Needs no ComfyUI. Writes
bench/results/planted_rank.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from aclora_core.config.choices import RestartMode, Threshold
from aclora_core.config.train_config import TrainConfig
from aclora_core.method.ac_lora import dynamic_threshold
from aclora_core.method.rank_rules import rank_rule
from aclora_core.method.restart import restart_adapter
from aclora_core.method.spectrum import delta_singular_values, truncate
from aclora_core.method.thresholds import Measure, SignalThreshold, is_restart_epoch, signal_counts

ROOT = Path(__file__).resolve().parents[1]
SHAPES = [(64, 64), (128, 48), (48, 128)]
RANK, TRUE_RANK, EXAMPLES, BATCH, STEPS, INTERVAL = 16, 3, 256, 32, 400, 10
LEARNING_RATE, SCALE, FIXED = 5e-3, TrainConfig.alpha / RANK, TrainConfig.fixed_threshold


@dataclass(frozen=True)
class Setting:
    """A restart mode and its rule for what is signal."""

    mode: RestartMode
    threshold: Threshold
    measure: Measure


@dataclass(frozen=True)
class Found:
    """The outcome of one layer."""

    at_last_restart: int  # signal components of the delta at the last restart
    reported: int  # signal rank in the report, from the final delta
    by_median: int  # what the median rule for white rank × rank matrices would have reported instead
    error: float  # ‖delta - D‖² / ‖D‖²
    error_cut: float  # that error after truncating the delta to its reported rank


class Layers:
    """All layers of one shape, one per seed, with their data."""

    def __init__(self, rows: int, cols: int, seeds: int, strength: float) -> None:
        generator = torch.Generator().manual_seed(rows * 1000 + cols)

        def normal(*shape: int) -> Tensor:
            return torch.randn(seeds, *shape, generator=generator)

        left, right = (torch.linalg.qr(normal(side, TRUE_RANK)).Q for side in (rows, cols))
        edge = (math.sqrt(rows) + math.sqrt(cols)) / math.sqrt(EXAMPLES)
        self.update = left * (torch.tensor([1.5, 1.25, 1.0]) * strength * edge) @ right.mT
        weight = normal(rows, cols) / math.sqrt(cols)
        self.inputs = normal(EXAMPLES, cols)
        outputs = self.inputs @ (weight + self.update).mT + normal(EXAMPLES, rows)
        self.unit = float(outputs.var())  # loss of predicting the mean, as in training
        self.target = outputs - self.inputs @ weight.mT
        start = (torch.rand(seeds, RANK, cols, generator=generator) * 2 - 1) / math.sqrt(cols)
        self.down, self.up = start.requires_grad_(), torch.zeros(seeds, rows, RANK, requires_grad=True)
        self.optimizer = torch.optim.AdamW([self.down, self.up], LEARNING_RATE)
        self.generator = generator

    def epoch(self) -> list[float]:
        """Train for one pass over the examples. Return the relative loss of each step."""
        losses = []
        for batch in torch.randperm(EXAMPLES, generator=self.generator).split(BATCH):
            error = SCALE * (self.inputs[:, batch] @ self.down.mT @ self.up.mT) - self.target[:, batch]
            each = error.square().mean((1, 2))
            self.optimizer.zero_grad()
            each.sum().backward()
            self.optimizer.step()
            losses.append(float(each.detach().mean()) / self.unit)
        return losses

    def restart(self, setting: Setting, threshold: SignalThreshold) -> list[int]:
        """Restart every layer, unless restarts are off. Return the number of signal components of each delta."""
        if setting.mode == "off":
            values = self.spectra()
            return signal_counts(values, RANK, RANK, threshold, setting.measure).tolist()
        pairs = zip(self.down.detach(), self.up.detach(), strict=True)
        layers = {str(place): (down, up, SCALE) for place, (down, up) in enumerate(pairs)}
        results = restart_adapter(layers, threshold, self.generator, setting.mode, setting.measure)
        for place, result in enumerate(results.values()):
            for factor, redrawn in ((self.down, result.redrawn_down), (self.up, result.redrawn_up)):
                for moment in ("exp_avg", "exp_avg_sq") if redrawn else ():
                    self.optimizer.state[factor][moment][place] = 0
        return [result.rank.kept_delta for result in results.values()]

    def spectra(self) -> Tensor:
        return delta_singular_values(self.down.detach(), self.up.detach(), SCALE).double()

    def results(self, at_last_restart: list[int], setting: Setting, threshold: SignalThreshold) -> list[Found]:
        """Report every layer by the rule of aclora_core.training."""
        if threshold == "noise floor":
            rule = rank_rule("noise_floor")
        else:
            rule = rank_rule(setting.measure, max(threshold, 1e-6))
        found = []
        for place, values in enumerate(self.spectra()):
            down, up, true = self.down[place].detach(), self.up[place].detach(), self.update[place]
            rank = rule(values)
            cut_down, cut_up = truncate(down, up, SCALE, rank)
            errors = [
                float((delta - true).square().sum() / true.square().sum())
                for delta in (SCALE * up @ down, cut_up @ cut_down)
            ]
            found.append(Found(at_last_restart[place], rank, median_rule(values), *errors))
        return found


def median_rule(values: Tensor) -> int:
    """Count values above 2.858 · median(d): Gavish and Donoho 2014, square white noise of unknown level."""
    return max(1, int((values > 2.858 * values.quantile(0.5)).sum()))


def fit(setting: Setting, seeds: int, strength: float) -> list[Found]:
    """Train a layer of each shape for each seed."""
    found = []
    for shape in SHAPES:
        layers = Layers(*shape, seeds, strength)
        epochs = STEPS // (EXAMPLES // BATCH)
        since, kept = list[float](), list[int]()
        threshold: SignalThreshold = "noise floor"
        for epoch in range(1, epochs + 1):
            since += layers.epoch()
            if is_restart_epoch(epoch, INTERVAL, epochs):
                if setting.threshold == "dynamic":
                    threshold = dynamic_threshold(statistics.fmean(since), epoch, epochs)
                elif setting.threshold == "fixed":
                    threshold = FIXED
                since = []
                kept = layers.restart(setting, threshold)
        found += layers.results(kept, setting, threshold)
    return found


def summary(found: list[Found]) -> dict[str, float]:
    """Return the mean of each column, and for each rank the share of layers in which it is the true one."""
    columns = {name: [getattr(each, name) for each in found] for name in Found.__dataclass_fields__}
    shares = {
        f"{name}_right": statistics.fmean(value == TRUE_RANK for value in columns[name])
        for name in ("at_last_restart", "reported", "by_median")
    }
    return {**{name: statistics.fmean(values) for name, values in columns.items()}, **shares}


def line(*cells: object) -> None:
    texts = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells]
    print("| " + " | ".join(texts) + " |", flush=True)


def settings() -> list[Setting]:
    """Return all combinations of mode, threshold and measure; the noise floor has no measure.

    The scheduled threshold is left out: at each restart it is a fixed one.
    """
    thresholds = [threshold for threshold in get_args(Threshold) if threshold != "scheduled"]
    combinations = itertools.product(get_args(RestartMode), thresholds, get_args(Measure))
    return [Setting(*each) for each in combinations if each[1:] != ("noise floor", "sum")]


def compare_settings(seeds: int) -> list[dict[str, object]]:
    """Print and return the table of all settings."""
    line("mode", "threshold", "measure", "rank 3 at last restart", "mean", "rank 3 in report", "mean", "error", "cut")
    line(*["---"] * 9)
    table = []
    for setting in settings():
        result = summary(fit(setting, seeds, 2.0))
        line(
            setting.mode,
            setting.threshold,
            "" if setting.threshold == "noise floor" else setting.measure,
            f"{result['at_last_restart_right']:.1%}",
            result["at_last_restart"],
            f"{result['reported_right']:.1%}",
            result["reported"],
            result["error"],
            result["error_cut"],
        )
        table.append({**asdict(setting), **result})
    return table


def compare_strengths(seeds: int, strengths: list[float]) -> dict[float, dict[str, float]]:
    """Compare the noise floor and the median rule for weaker and stronger components."""
    line("weakest component, times the edge", "rank 3 in report", "mean", "rank 3 by the median rule", "mean")
    line(*["---"] * 5)
    table = {}
    for strength in strengths:
        result = table[strength] = summary(fit(Setting("product", "noise floor", "energy"), seeds, strength))
        line(
            strength,
            f"{result['reported_right']:.1%}",
            result["reported"],
            f"{result['by_median_right']:.1%}",
            result["by_median"],
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.planted_rank", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--strengths", type=float, nargs="+", default=[1.25, 1.5, 2.0, 3.0, 5.0])
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    print(f"\nTrue rank {TRUE_RANK}, weakest component 2 times the edge, {args.seeds} seeds of {len(SHAPES)} shapes\n")
    table = compare_settings(args.seeds)
    print("\nproduct with the noise floor, on weaker and stronger components\n")
    strengths = compare_strengths(args.seeds, args.strengths)
    seconds = round(time.monotonic() - began)
    print(f"\n{seconds} s")
    constants = {
        "seeds": args.seeds,
        "shapes": SHAPES,
        "rank": RANK,
        "true_rank": TRUE_RANK,
        "steps": STEPS,
        "examples": EXAMPLES,
        "learning_rate": LEARNING_RATE,
        "seconds": seconds,
    }
    path = ROOT / "bench" / "results" / "planted_rank.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**constants, "settings": table, "strengths": strengths}, indent=1) + "\n")


if __name__ == "__main__":
    main()
