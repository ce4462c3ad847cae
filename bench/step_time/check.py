"""Check that CUDA graphs train like eager steps: equal losses and equal ΔW from one seed, within rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.step_time import aclora as ours
from bench.step_time.clock import collect_log, release
from bench.step_time.models import Case

STEPS = 50
LOSS_TOLERANCE = 2**-7  # relative difference of a step's loss: two roundings of bf16
DELTA_TOLERANCE = 0.05  # Frobenius norm of the difference of all ΔW, relative to that of ΔW
GRADIENTS = "gradients"  # name of the check that compares gradients instead of trainings
_MAX_GRADIENT_RATIO = 1.2  # the kernels' distance from float32, relative to that of PyTorch's own layers
_FAILURES = "cannot be captured", "no preview", "no checkpoint"  # parts of the pack's log messages


@dataclass(frozen=True)
class Scenario:
    """A situation in which training with CUDA graphs must agree with eager training."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    sizes: int = 1  # number of different image sizes
    stop_after: int = STEPS  # step of the cancel
    resumed: bool = False  # whether a second training resumes from the checkpoint
    preview_every: int = 0  # steps; only with graphs, as previews change no result
    free_gb: float = 0.0  # GPU memory left free beside SD1.5; only with graphs
    eager: dict[str, Any] = field(default_factory=dict)  # settings that differ in the eager training


SCENARIOS = (
    Scenario("plain"),
    Scenario("restarts", {"mode": "paper", "restart_every": 5}),
    Scenario("learning rate changes", {"schedule": "cosine", "warm_up": 5}),
    Scenario("gradient accumulation, two sizes", {"batch_size": 1, "accumulate": 3}, sizes=2),
    Scenario("two image sizes", sizes=2),
    Scenario("smaller last batch", {"batch_size": 3}),
    Scenario("EMA", {"ema_decay": 0.9}),
    Scenario("cancelled", stop_after=20),
    Scenario("resumed", {"mode": "paper", "restart_every": 5}, stop_after=20, resumed=True),
    Scenario("previews", preview_every=7),
    Scenario("gradient checkpointing", {"checkpointing": "all"}),
    Scenario("too little memory for a batch", {"batch_size": 4}, free_gb=1.3, eager={"batch_size": 2, "accumulate": 2}),
)


@dataclass(frozen=True)
class Difference:
    """How much two trainings differ."""

    loss: float  # largest relative difference of a step's loss
    delta: float  # relative difference of ΔW
    norm: float  # Frobenius norm of ΔW; 0 if nothing was learned
    steps: tuple[int, int]

    def complaints(self, noise: Difference | None = None) -> list[str]:
        """Return what is wrong, in sentences; empty if the trainings agree.

        noise: the difference of two equal eager trainings; as much is always tolerated.
        """
        wrong = []
        loss, delta = LOSS_TOLERANCE, DELTA_TOLERANCE
        if noise is not None:
            loss, delta = max(loss, noise.loss), max(delta, noise.delta)
        if self.steps[0] != self.steps[1]:
            wrong.append(f"the trainings ran {self.steps[0]} and {self.steps[1]} steps")
        if not self.norm > 0:
            wrong.append("nothing was learned")
        if not self.loss <= loss:
            wrong.append(f"losses differ by up to {self.loss:.3%}, more than {loss:.3%}")
        if not self.delta <= delta:
            wrong.append(f"ΔW differs by {self.delta:.2%}, more than {delta:.2%}")
        return wrong


def compare(one: Any, other: Any) -> Difference:
    """Compare the results of two trainings; the second is the reference."""
    losses = [torch.tensor(result.report.losses, dtype=torch.float64) for result in (one, other)]
    shared = min(map(len, losses))
    loss = float("inf")
    if shared == len(losses[1]):
        loss = float(((losses[0] - losses[1])[:shared].abs() / losses[1][:shared].abs()).max())
    delta, norm = _delta_difference(one.adapter.layers, other.adapter.layers)
    return Difference(loss, delta, norm, (len(losses[0]), len(losses[1])))


def _delta_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float]:
    """Return ‖ΔW₁ - ΔW₂‖ / ‖ΔW₂‖ over all layers, and ‖ΔW₂‖, from the factors in float64."""
    if one.keys() != other.keys():
        return float("inf"), 0.0
    difference = reference = 0.0
    for name in other:
        first, second = _factors(one[name]), _factors(other[name])
        square = _product(second, second)
        difference += max(0.0, _product(first, first) - 2 * _product(first, second) + square)
        reference += square
    return (difference / reference) ** 0.5 if reference else float("inf"), reference**0.5


def _factors(layer: Any) -> tuple[Tensor, Tensor]:
    down, up = layer.factors()
    return down.double(), up.double() * layer.scale


def _product(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """Return ⟨ΔW₁, ΔW₂⟩ (Frobenius) without forming either."""
    return float(((one[1].T @ other[1]) * (one[0] @ other[0].T)).sum())


def run(pack: ModuleType, cases: Sequence[Case], steps: int = STEPS, wanted: Sequence[str] = ()) -> bool:
    """Run every scenario, or those wanted, on every case; print the differences and return whether all agree."""
    chosen = [scenario for scenario in SCENARIOS if not wanted or scenario.name in wanted]
    agree = True
    for case in cases:
        scenarios = [scenario for scenario in chosen if case.name == "sd15" or not scenario.free_gb]
        agree &= _case(pack, case, scenarios, steps, not wanted or GRADIENTS in wanted)
    return agree


def _case(pack: ModuleType, case: Case, scenarios: Sequence[Scenario], steps: int, gradients: bool) -> bool:
    agree, noise = [], None
    if SCENARIOS[0] in scenarios:
        # Kernels that sum in no fixed order differ from run to run; this measures by how much.
        noise = compare(*(_trained(pack, case, SCENARIOS[0], steps, graph=False)[0] for _ in range(2)))
        print(f"  {case.title}, eager twice: losses differ by {noise.loss:.4%}, ΔW by {noise.delta:.3%}", flush=True)
    if gradients:
        agree.append(_gradients(pack, case))
    agree += [_scenario(pack, case, scenario, steps, noise) for scenario in scenarios]
    return all(agree)


def _gradients(pack: ModuleType, case: Case) -> bool:
    """Return whether the kernels' gradients are about as close to float32's as those of PyTorch's own layers."""
    exact = replace(case, dtype=torch.float32)
    start = _two_steps(pack, exact, rate=1e-30)
    right = _two_steps(pack, exact) - start
    kernels = _two_steps(pack, case) - start
    plain = _two_steps(pack, case, without="kernels") - start
    far = float((kernels - right).norm() / right.norm())
    usual = float((plain - right).norm() / right.norm())
    wrong = "" if far <= _MAX_GRADIENT_RATIO * usual else "; WRONG: the kernels are less accurate"
    print(f"  {case.title}, gradients: {far:.3%} from float32, without the kernels {usual:.3%}{wrong}", flush=True)
    return not wrong


def _two_steps(pack: ModuleType, case: Case, without: str | None = None, rate: float = 10.0) -> Tensor:
    """Return all factors after two SGD steps: the first moves lora_up from zero, the second lora_down too."""
    release()
    settings = {
        "steps": 2,
        "batch_size": 2,
        "graph": False,
        "optimizer": "SGD",
        "weight_decay": 0.0,
        "max_norm": 1.0,
        "learning_rate": rate,
        ours.WITHOUT: without,
    }
    layers = ours.trained(pack, case, settings).adapter.layers
    return torch.cat([factor.double().flatten() for name in sorted(layers) for factor in layers[name].factors()])


def _scenario(pack: ModuleType, case: Case, scenario: Scenario, steps: int, noise: Difference | None) -> bool:
    graph, said = _trained(pack, case, scenario, steps, graph=True)
    whole = replace(scenario, resumed=False, stop_after=steps) if scenario.resumed else scenario
    plain = replace(whole, preview_every=0, free_gb=0.0, settings=whole.settings | whole.eager)
    eager, _ = _trained(pack, case, plain, steps, graph=False)
    difference = compare(graph, eager)
    messages = said + graph.report.facts.notes.splitlines()
    wrong = difference.complaints(noise)
    wrong += [message for message in messages if any(sign in message for sign in _FAILURES)]
    expected = steps if scenario.resumed else min(steps, scenario.stop_after)
    if difference.steps[0] != expected:
        wrong.append(f"{difference.steps[0]} steps were made instead of {expected}")
    if "mode" in scenario.settings and steps == STEPS and not graph.report.restarts:
        wrong.append("there was no restart")
    if scenario.resumed and steps > scenario.stop_after and not any("resumed at" in line for line in said):
        wrong.append("it was not resumed")
    if scenario.free_gb and torch.cuda.is_available() and not any("at a time" in line for line in said):
        wrong.append("the batch was not split")
    if scenario.preview_every and not graph.report.facts.preview_seconds:
        wrong.append("no preview was drawn")
    print(
        f"  {case.title}, {scenario.name}: losses differ by {difference.loss:.4%}, ΔW by {difference.delta:.3%}, "
        f"‖ΔW‖ {difference.norm:.3g}{''.join(f'; WRONG: {sentence}' for sentence in wrong)}",
        flush=True,
    )
    return not wrong


def _trained(pack: ModuleType, case: Case, scenario: Scenario, steps: int, graph: bool) -> tuple[Any, list[str]]:
    settings = {"steps": steps, "batch_size": 2, **scenario.settings, "graph": graph}

    def part(stop_after: int, folder: Path | None = None) -> Any:
        release()
        return ours.trained(
            pack,
            case,
            settings,
            scenario.sizes,
            lambda losses: len(losses) >= stop_after,
            folder,
            scenario.preview_every,
            scenario.free_gb,
        )

    with collect_log() as said, TemporaryDirectory() as folder:
        if not scenario.resumed:
            return part(scenario.stop_after), said
        part(scenario.stop_after, Path(folder))
        return part(steps, Path(folder)), said
