"""Exponential moving average (EMA) of an adapter's weights, which is steadier than the weights of any single step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..lora import FlatParameters


class Ema:
    """average ← d · average + (1 − d) · weights after each step, with d = min(decay, (1 + n) / (10 + n)) at step n.

    The warm-up of d lets the average leave its start, an adapter that does nothing, as fast as the weights do.

    Args:
        weights: the parameters to average; their current values are the first average.
        decay: limit of d, in 0..1. Larger averages over more steps.
    """

    def __init__(self, weights: FlatParameters, decay: float) -> None:
        self._weights = weights
        self.decay = decay
        self.value = weights.master.clone()
        self._last_good = weights.master.clone()  # the average before the last finite step
        self._steps = torch.zeros((), device=weights.master.device)

    @torch.no_grad()
    def update(self, good: Tensor) -> None:
        """Average in the current weights, on the device.

        Args:
            good: scalar bool; where false, the step was skipped and the average stays as it is.
        """
        torch.where(good, self.value, self._last_good, out=self._last_good)
        self._steps += good
        decay = ((1 + self._steps) / (10 + self._steps)).clamp_max(self.decay)
        averaged = torch.lerp(self.value, self._weights.master, 1 - decay)
        torch.where(good, averaged, self.value, out=self.value)

    @torch.no_grad()
    def restart(self, spans: Iterable[slice]) -> None:
        """Restart the average of replaced weights at their new values.

        An average of replaced weights is meaningless, and so is the mean of old and new noise. The warm-up starts over
        for all weights: with a high decay the new values would otherwise dominate the average for a thousand steps.
        Layers that were not replaced then follow their weights a little faster for a while, which does no harm.

        Args:
            spans: of the replaced factors in the flat tensor. Give lora_down and lora_up of a layer together, as one
                means nothing without the other.
        """
        spans = list(spans)
        for span in spans:
            self.value[span] = self._weights.master[span]
        if spans:
            self._steps.zero_()

    def restore_last_good(self) -> None:
        """Restore the average from before the last finite step."""
        self.value.copy_(self._last_good)

    def tensors(self) -> list[Tensor]:
        """Tensors that update changes in place."""
        return [self.value, self._last_good, self._steps]

    def state_dict(self) -> dict[str, Tensor]:
        """State for a checkpoint; the tensors are not copied."""
        return {"value": self.value, "last_good": self._last_good, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a state_dict in place."""
        self.value.copy_(state["value"])
        self._last_good.copy_(state["last_good"])
        self._steps.copy_(state["steps"])
