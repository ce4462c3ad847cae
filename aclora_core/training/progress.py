"""Where a training stands while it runs, and what it gives in the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from ..adapter import Adapter, Layer, RankReport, Restart, Stage, TruncationLoss, skipped_steps
from .compression import TruncationRule


@dataclass
class Progress:
    """Where a training stands; what a callback may look at."""

    total: int  # steps of the passes up to this one
    done: int = 0  # steps, of all passes
    remaining: int = 0  # steps of a second pass, at most, as far as known
    stage: Stage = "training"
    learning_rate: float = 0.0  # of the last step
    losses: list[float] = field(default_factory=list)  # of every step of this pass, relative to the mean target
    restarts: list[Restart] = field(default_factory=list)  # of this pass
    validation: list[tuple[int, float]] = field(default_factory=list)  # step and held-out loss
    resumed_at: int = 0  # steps that an earlier run had done
    memory: str = ""  # what a step was expected to take, where that is known
    notes: list[str] = field(default_factory=list)  # sentences for the user: what went wrong, and what to do

    @property
    def skipped_steps(self) -> int:
        """How many steps of this pass changed nothing, as their loss or gradient was not finite."""
        return skipped_steps(self.losses)

    def note(self, sentence: str) -> None:
        """Has the user told, once, however often it happens."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    @property
    def last_finite_step(self) -> int:
        """The last step of this pass that changed something; 0 where none did."""
        return max((step for step, loss in enumerate(self.losses, start=1) if math.isfinite(loss)), default=0)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        trajectory = RankReport({}, self.losses, self.validation, self.restarts, {}, {})
        return {"total": self.total, "done": self.done, "stage": self.stage, "trajectory": trajectory.to_json()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from where another one stood."""
        trajectory = RankReport.from_json(state["trajectory"])
        self.total, self.done, self.stage = state["total"], state["done"], state["stage"]
        self.losses, self.restarts = trajectory.losses, trajectory.restarts
        self.validation = trajectory.validation
        self.resumed_at = self.done


@dataclass(frozen=True, eq=False)
class Result:
    """What a training gives, also one that was stopped early."""

    adapter: Adapter
    report: RankReport


@dataclass(frozen=True, eq=False)
class FirstPass:
    """What the pass with held-out pictures found out."""

    adapter: Adapter  # of the best step, as far as it was measured, and cut
    cut: TruncationRule
    cuts: list[TruncationLoss]  # what other cuts lose
    steps: int  # of which it is

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        layers = {name: _layer_state(layer) for name, layer in self.adapter.layers.items()}
        cuts = [cut.to_dict() for cut in self.cuts]
        return {"layers": layers, "cut": asdict(self.cut), "cuts": cuts, "steps": self.steps}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> FirstPass:
        """The one that state_dict was asked of."""
        adapter = Adapter({name: Layer(**layer) for name, layer in state["layers"].items()})
        return cls(
            adapter,
            TruncationRule(**state["cut"]),
            [TruncationLoss.from_dict(cut) for cut in state["cuts"]],
            state["steps"],
        )


def _layer_state(layer: Layer) -> dict[str, Tensor | float]:
    return {"lora_down": layer.lora_down, "lora_up": layer.lora_up, "alpha": layer.alpha}
