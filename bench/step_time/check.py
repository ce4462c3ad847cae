"""Whether graphs learn what eager steps learn: the same losses and the same ΔW from the same seed."""

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
from bench.step_time.clock import listening, release
from bench.step_time.models import Case

STEPS = 50
LOSS_TOLERANCE = 2**-7  # of a step's loss, relative: two roundings of bf16
GRADIENTS = "gradients"  # names the comparison of kernels, which is no training
_WORSE = 1.2  # times PyTorch's distance from float32 that the kernels may have
DELTA_TOLERANCE = 0.05  # Frobenius norm of the difference of all ΔW, relative to that of ΔW


_FAILURES = "cannot be captured", "no preview", "no checkpoint"  # in what the pack says


@dataclass(frozen=True)
class Scenario:
    """What happens during a training while graphs are in use."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    sizes: int = 1  # of pictures
    stop_after: int = STEPS  # a cancel at this step
    resumed: bool = False  # whether another training goes on from there
    preview_every: int = 0  # steps; only where graphs are in use, as previews change nothing
    room: float = 0.0  # GB free on the GPU beside SD1.5; only where graphs are in use
    eager: dict[str, Any] = field(default_factory=dict)  # settings of the eager training that are others


SCENARIOS = (
    Scenario("plain"),
    Scenario("restarts", {"mode": "paper", "restart_every": 5}),
    Scenario("learning rate changes", {"schedule": "cosine", "warm_up": 5}),
    Scenario("gradients added up, two sizes", {"batch_size": 1, "accumulate": 3}, sizes=2),
    Scenario("pictures of two sizes", sizes=2),
    Scenario("last batch smaller", {"batch_size": 3}),
    Scenario("running average", {"ema_decay": 0.9}),
    Scenario("cancelled", stop_after=20),
    Scenario("resumed", {"mode": "paper", "restart_every": 5}, stop_after=20, resumed=True),
    Scenario("previews", preview_every=7),
    Scenario("blocks computed twice", {"checkpointing": "all"}),
    Scenario("too little memory for a batch", {"batch_size": 4}, room=1.3, eager={"batch_size": 2, "accumulate": 2}),
)


@dataclass(frozen=True)
class Difference:
    """How far two trainings are apart."""

    loss: float  # largest relative difference of a step's loss
    delta: float  # relative difference of ΔW
    norm: float  # of ΔW, so that it shows that something was learned
    steps: tuple[int, int]

    def complaints(self, noise: Difference | None = None) -> list[str]:
        """What is wrong, in sentences; none where the trainings agree, or as well as two that should be the same."""
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
    """Two trainings' results, the second being the reference."""
    losses = [torch.tensor(result.report.losses, dtype=torch.float64) for result in (one, other)]
    shared = min(map(len, losses))
    apart = ((losses[0] - losses[1])[:shared].abs() / losses[1][:shared].abs()) if shared == len(losses[1]) else None
    loss = float("inf") if apart is None else float(apart.max())
    delta, norm = _apart(one.adapter.layers, other.adapter.layers)
    return Difference(loss, delta, norm, (len(losses[0]), len(losses[1])))


def _apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float]:
    """‖ΔW₁ - ΔW₂‖ / ‖ΔW₂‖ over all layers, and ‖ΔW₂‖, from the factors and in float64."""
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
    """Σ ΔW₁ ∘ ΔW₂ without either."""
    return float(((one[1].T @ other[1]) * (one[0] @ other[0].T)).sum())


def run(pack: ModuleType, cases: Sequence[Case], steps: int = STEPS, wanted: Sequence[str] = ()) -> bool:
    """Every scenario, or those wanted, for every case; prints what differs, and gives whether all agree."""
    chosen = [scenario for scenario in SCENARIOS if not wanted or scenario.name in wanted]
    fitting = {case.name: [each for each in chosen if case.name == "sd15" or not each.room] for case in cases}
    return all([_case(pack, case, fitting[case.name], steps, not wanted or GRADIENTS in wanted) for case in cases])


def _case(pack: ModuleType, case: Case, scenarios: Sequence[Scenario], steps: int, gradients: bool) -> bool:
    agree, noise = [], None
    if SCENARIOS[0] in scenarios:
        # Kernels that add in no fixed order differ from run to run: this is how much of what follows is theirs.
        noise = compare(*(_trained(pack, case, SCENARIOS[0], steps, graph=False)[0] for _ in range(2)))
        print(f"  {case.title}, eager twice: losses {noise.loss:.4%}, ΔW {noise.delta:.3%} apart", flush=True)
    if gradients:
        agree.append(_gradients(pack, case))
    agree += [_scenario(pack, case, scenario, steps, noise) for scenario in scenarios]
    return all(agree)


def _gradients(pack: ModuleType, case: Case) -> bool:
    """Whether the kernels' gradients are about as near to float32's as those of PyTorch's own layers."""
    exact = replace(case, dtype=torch.float32)
    start = _two_steps(pack, exact, rate=1e-30)
    right = _two_steps(pack, exact) - start
    ours_, plain = (_two_steps(pack, case, lever) - start for lever in (None, "kernels"))
    far, usual = (float((found - right).norm() / right.norm()) for found in (ours_, plain))
    wrong = "" if far <= _WORSE * usual else "; WRONG: the kernels are further away"
    print(f"  {case.title}, gradients: {far:.3%} from float32, without the kernels {usual:.3%}{wrong}", flush=True)
    return not wrong


def _two_steps(pack: ModuleType, case: Case, lever: str | None = None, rate: float = 10.0) -> Tensor:
    """All factors after two steps along the gradient: the first moves lora_up from zero, the second lora_down too."""
    release()
    settings = {
        "steps": 2,
        "batch_size": 2,
        "graph": False,
        "optimizer": "SGD",
        "weight_decay": 0.0,
        "max_norm": 1.0,
        "learning_rate": rate,
        ours.WITHOUT: lever,
    }
    layers = ours.trained(pack, case, settings).adapter.layers
    return torch.cat([factor.double().flatten() for name in sorted(layers) for factor in layers[name].factors()])


def _scenario(pack: ModuleType, case: Case, scenario: Scenario, steps: int, noise: Difference | None) -> bool:
    graph, said = _trained(pack, case, scenario, steps, graph=True)
    whole = replace(scenario, resumed=False, stop_after=steps) if scenario.resumed else scenario
    plain = replace(whole, preview_every=0, room=0.0, settings=whole.settings | whole.eager)
    eager, _ = _trained(pack, case, plain, steps, graph=False)
    difference = compare(graph, eager)
    told = said + str(graph.report.settings.get("notes", "")).splitlines()
    wrong = difference.complaints(noise)
    wrong += [line for line in told if any(sign in line for sign in _FAILURES)]
    expected = steps if scenario.resumed else min(steps, scenario.stop_after)
    if difference.steps[0] != expected:
        wrong.append(f"{difference.steps[0]} steps were made instead of {expected}")
    if "mode" in scenario.settings and steps == STEPS and not graph.report.restarts:
        wrong.append("there was no restart")
    if scenario.resumed and steps > scenario.stop_after and not any("resumed at" in line for line in said):
        wrong.append("it was not resumed")
    if scenario.room and torch.cuda.is_available() and not any("at a time" in line for line in said):
        wrong.append("the batch was not parted")
    if scenario.preview_every and not graph.report.settings.get("preview_seconds"):
        wrong.append("no preview was drawn")
    print(
        f"  {case.title}, {scenario.name}: losses {difference.loss:.4%} and ΔW {difference.delta:.3%} apart, "
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
            scenario.room,
        )

    with listening() as said, TemporaryDirectory() as folder:
        if not scenario.resumed:
            return part(scenario.stop_after), said
        part(scenario.stop_after, Path(folder))
        return part(steps, Path(folder)), said
