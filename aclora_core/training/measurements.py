"""Measurements while a training runs: when they come, and what they have found."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from .fixed_noise import NOISE_FRACTIONS, FixedNoiseImages

# A forward pass alone takes some 40 % of a step on the same images. A measurement comes when 25 times its cost has been
# spent on steps, which leaves it 4 % of the time.
_STEPS_PER_PASS = 0.4 * 25


class Measurements:
    """Measures some images now and then while a training runs.

    Args:
        images: at fixed noise.
        images_per_step: how many images a step takes; with it measurements come as rarely as they cost.
        unit: the loss of predicting the mean target; losses are divided by it.
    """

    def __init__(self, images: FixedNoiseImages, images_per_step: int, unit: float) -> None:
        self.images, self.unit = images, unit
        forward_passes = len(images.indices) * len(NOISE_FRACTIONS)
        self.interval = math.ceil(_STEPS_PER_PASS * forward_passes / images_per_step)
        self.history: list[tuple[int, float]] = []  # step and loss
        self.last_restart = 0  # step of the last restart, after which a share of the adapter is fresh noise

    def is_due(self, step: int, last_step: int) -> bool:
        """Return whether to measure after this step."""
        return step % self.interval == 0 or step == last_step

    def is_overdue(self, step: int, last_step: int) -> bool:
        """Return whether a measurement is due at this step and is missing, as one that was interrupted."""
        return self.is_due(step, last_step) and not (self.history and self.history[-1][0] == step)

    def measure(self, step: int, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Measure the adapter as it is.

        should_stop: asked between batches, as after a cancel; a measurement that was stopped leaves no loss.
        """
        parts = []
        stopped = False
        for part in self.images.iterate_losses():
            if stopped := should_stop():
                break
            parts.append(part)
        if not self.images.processes.any(stopped):
            self.record(step, float(self.images.collect(parts).mean()) / self.unit)

    def record(self, step: int, loss: float) -> None:
        """Take a loss into the history."""
        self.history.append((step, loss))

    def ends_training(self) -> bool:
        """Return whether the training should end."""
        return False

    @property
    def reason(self) -> str:
        """Why the training ends, as a clause."""
        return ""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it."""
        return {"history": [list(pair) for pair in self.history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self.history[:] = [(step, loss) for step, loss in state["history"]]
