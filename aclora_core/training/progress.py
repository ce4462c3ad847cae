"""Where a training stands while it runs, and what it returns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..adapter import Adapter, RankReport, Restart, Stage, skipped_steps


@dataclass
class Progress:
    """Where a training stands; callbacks may read it."""

    total: int  # steps of the passes up to this one
    done: int = 0  # steps, of all passes
    remaining: int = 0  # steps of a second pass, at most, as far as known
    stage: Stage = "training"
    learning_rate: float = 0.0  # of the last step
    losses: list[float] = field(
        default_factory=list
    )  # reported, of each step of this pass, relative to the mean target
    restarts: list[Restart] = field(default_factory=list)  # of this pass
    validation: list[tuple[int, float]] = field(default_factory=list)  # (step, loss of held-out images)
    fit: list[tuple[int, float]] = field(default_factory=list)  # (step, loss of training images at fixed noise)
    resumed_at: int = 0  # steps that an earlier run had done
    memory: str = ""  # what a step is expected to need, where that is known
    notes: list[str] = field(default_factory=list)  # sentences for the user: what went wrong, and what to do

    @property
    def step(self) -> int:
        """Steps of this pass that are done."""
        return len(self.losses)

    @property
    def skipped_steps(self) -> int:
        """Steps of this pass that changed nothing, as their loss or gradient was not finite."""
        return skipped_steps(self.losses)

    @property
    def last_finite_step(self) -> int:
        """The last step of this pass that changed something; 0 where none did."""
        return max((step for step, loss in enumerate(self.losses, start=1) if math.isfinite(loss)), default=0)

    def record(self, loss: float, learning_rate: float) -> None:
        """Count one more step."""
        self.losses.append(loss)
        self.learning_rate = learning_rate
        self.done += 1

    def note(self, sentence: str) -> None:
        """Add a sentence for the user; one that is there already is not repeated."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it."""
        trajectory = RankReport({}, self.losses, self.validation, self.restarts, {}, {}, fit=self.fit)
        return {"total": self.total, "done": self.done, "stage": self.stage, "trajectory": trajectory.to_json()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        trajectory = RankReport.from_json(state["trajectory"])
        self.total, self.done, self.stage = state["total"], state["done"], state["stage"]
        self.losses, self.restarts = trajectory.losses, trajectory.restarts
        self.validation, self.fit = trajectory.validation, trajectory.fit
        self.resumed_at = self.done


@dataclass(frozen=True, eq=False)
class Result:
    """What a training returns, also one that was stopped early."""

    adapter: Adapter
    report: RankReport
