"""Early stopping by the loss of held-out images, and the weights of the best step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..lora import FlatParameters
from .fixed_noise import FixedNoiseImages
from .measurements import Measurements

_PATIENCE = 3  # measurements


class EarlyStopping(Measurements):
    """Measures the loss of held-out images, keeps the weights of the best step, and says when it is passed.

    Args:
        held_out: the images to measure.
        parameters: the adapter's weights.
        images_per_step: how many images a step takes.
        unit: the loss of predicting the mean target; losses are divided by it.
    """

    def __init__(
        self, held_out: FixedNoiseImages, parameters: FlatParameters, images_per_step: int, unit: float
    ) -> None:
        super().__init__(held_out, images_per_step, unit)
        self.parameters = parameters
        self.best_step, self.best_loss = 0, math.inf
        self._best = parameters.master.clone()

    def record(self, step: int, loss: float) -> None:
        """Take a loss into the history; the untrained adapter, at step 0, is never the best."""
        super().record(step, loss)
        if step > 0 and loss < self.best_loss:
            self.best_step, self.best_loss = step, loss
            self._best.copy_(self.parameters.master)

    def ends_training(self) -> bool:
        """Return whether the best step lies so far back that a better one is not expected."""
        since = self.history[-1][0] - self.best_step if self.history else 0
        return self.best_step > 0 and since >= max(_PATIENCE * self.interval, self.best_step / 2)

    @property
    def reason(self) -> str:
        """Why the training ends, as a clause."""
        return f"step {self.best_step} was better"

    @property
    def improves(self) -> bool:
        """Whether the best step is better than the model alone, as far as that was measured."""
        measured_first = bool(self.history) and self.history[0][0] == 0
        return not measured_first or not self.best_loss >= self.history[0][1]

    def restore_best(self, step: int) -> int:
        """Go back to the weights of the best step, if a later one was measured, and return the step that they are of.

        step: the step that the weights are of now.
        """
        if not (self.best_step and self.history[-1][0] > self.best_step):
            return step
        with torch.no_grad():
            self.parameters.master.copy_(self._best)
        self.parameters.refresh()
        return self.best_step

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it."""
        best = {"best_step": self.best_step, "best_loss": self.best_loss, "best": self._best}
        return {**super().state_dict(), **best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        super().load_state_dict(state)
        self.best_step, self.best_loss = state["best_step"], state["best_loss"]
        self._best.copy_(state["best"])
