"""One optimisation step: loss, gradients, and the change of the adapter's weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


class Stepper:
    """Steps AdamW over the adapter's factors, and leaves out steps whose loss or gradient is not finite."""

    def __init__(self, factors: Sequence[Tensor], learning_rate: float, weight_decay: float, max_norm: float) -> None:
        self.factors = list(factors)
        self.max_norm = max_norm
        self.skipped_in_a_row = 0
        fused = self.factors[0].device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.factors, lr=learning_rate, weight_decay=weight_decay, fused=fused)

    def step(self, loss_of_batch: Callable[[], Tensor]) -> float:
        """One step on the loss that the call gives, and its value; NaN where the step was left out."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = loss_of_batch()
        loss.backward()
        total = loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.factors, self.max_norm)
        if not (math.isfinite(total) and math.isfinite(norm.item())):
            self.skipped_in_a_row += 1
            return math.nan
        self.skipped_in_a_row = 0
        self.optimizer.step()
        return total

    def forget(self, factors: Iterable[Tensor]) -> None:
        """Clears the moments of factors that were redrawn: they speak of weights that are gone."""
        for factor in factors:
            for value in self.optimizer.state.get(factor, {}).values():
                if isinstance(value, Tensor):
                    value.zero_()
