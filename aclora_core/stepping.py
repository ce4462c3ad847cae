"""Optimisation steps: loss, gradients, and the change of the adapter's weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .adapter_weights import AdapterWeights
from .batches import Batch
from .graphs import Graphs


class Stepper:
    """Steps AdamW over the adapter's weights, and leaves out steps whose loss or gradient is not finite.

    loss_of: what a batch, on the adapter's device, adds to the loss of its step; a scalar. Whether a step is finite,
    and how far its gradient is shortened, is decided on the device, so that the GPU never waits for the processor.
    """

    def __init__(
        self,
        weights: AdapterWeights,
        loss_of: Callable[[Batch], Tensor],
        graphs: Graphs,
        learning_rate: float,
        weight_decay: float,
        max_norm: float,
    ) -> None:
        self.weights, self.graphs, self.max_norm = weights, graphs, max_norm
        self.skipped_in_a_row = 0
        self._loss_of = loss_of
        device = weights.master.device
        self._loss, self._left_out = torch.zeros((), device=device), torch.zeros((), device=device)
        self._shortened = torch.ones((), device=device)  # how many times the gradient was too long
        # Of all batches of a step, in float32; the model's own type would lose what small batches add.
        of_leaves = weights.gradient
        self._gradient = of_leaves if of_leaves.dtype == torch.float32 else torch.zeros_like(weights.master)
        parameter = torch.nn.Parameter(weights.master)
        parameter.grad = self._gradient
        self._fused = device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(
            [parameter], lr=learning_rate, weight_decay=weight_decay, fused=self._fused,
            capturable=device.type == "cuda",
        )  # fmt: skip
        self._state = self._make_state(parameter) if self._fused else {}

    def _make_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The optimizer's state, made by a step that it is told to leave out: a graph could not make it."""
        self.optimizer.found_inf = self._left_out  # type: ignore[attr-defined]
        self.optimizer.grad_scale = self._shortened  # type: ignore[attr-defined]
        self._left_out.fill_(1)
        self.optimizer.step()
        return self.optimizer.state[parameter]

    def step(self, batches: Sequence[Batch]) -> float:
        """One step on the sum of the batches' losses, and its value; NaN where the step was left out."""
        for batch in batches:
            self.graphs.call(self._accumulate, batch, batch.key, [self._loss, self._gradient, self.weights.gradient])
        changed = [self.weights.master, self._loss, self._gradient, *self._state.values()]
        value = float(self.graphs.call(self._update, (), (), changed))
        self.skipped_in_a_row = 0 if math.isfinite(value) else self.skipped_in_a_row + 1
        return value

    def _accumulate(self, batch: Batch) -> None:
        loss = self._loss_of(batch)
        loss.backward()
        with torch.no_grad():
            self._loss += loss
            if self._gradient is not self.weights.gradient:
                self._gradient += self.weights.gradient
                self.weights.gradient.zero_()

    def clear_gradients(self) -> None:
        """Forgets what an unfinished step has added up."""
        for tensor in (self._loss, self._gradient, self.weights.gradient):
            tensor.zero_()

    @torch.no_grad()
    def _update(self, _: object) -> Tensor:
        norm = torch.linalg.vector_norm(self._gradient)
        good = torch.isfinite(self._loss) & torch.isfinite(norm)
        loss = torch.where(good, self._loss, math.nan)
        self._left_out.copy_(~good)
        self._shortened.copy_((norm / self.max_norm).clamp_min(1))
        if self._fused:
            self.optimizer.step()
        elif bool(good):
            self._gradient /= self._shortened
            self.optimizer.step()
        self.weights.refresh()
        self._gradient.zero_()
        self._loss.zero_()
        return loss

    def forget(self, factors: Iterable[Tensor]) -> None:
        """Clears the moments of factors that were redrawn: they speak of weights that are gone."""
        spans = [self.weights.span(factor) for factor in factors]
        for state in self.optimizer.state.values():
            for moments in (state["exp_avg"], state["exp_avg_sq"]):
                for span in spans:
                    moments[span] = 0
