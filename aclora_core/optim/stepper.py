"""Optimisation steps: loss, gradients, and the change of the adapter's weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..acceleration import CudaGraphRunner, find_kernels
from ..config import OptimizerName
from ..diffusion import Batch
from ..lora import FlatParameters
from ..storage import tensors_in
from .ema import Ema
from .grad_scaler import GradScaler
from .optimizers import FlatOptimizer

Loss = Callable[[Batch], Tensor | tuple[Tensor, Tensor]]


class Stepper:
    """Steps an optimizer over the adapter's weights, and leaves out steps whose loss or gradient is not finite.

    loss_of: what a batch, on the adapter's device, adds to the loss of its step; a scalar, or two: what is to become
    smaller, and what is told. Whether a step is finite, and how far its gradient is shortened, is decided on the
    device, so that the GPU never waits for the processor. ema_decay: of the running average that is shown and given in
    the end; 0 for none.

    Gradients of float16 are scaled. A step whose gradient overflows is done once more at half the scale, so no picture
    is passed over.
    """

    def __init__(
        self,
        weights: FlatParameters,
        loss_of: Loss,
        graphs: CudaGraphRunner,
        learning_rate: float,
        weight_decay: float,
        max_norm: float,
        *,
        optimizer: OptimizerName = "AdamW",
        ema_decay: float = 0.0,
    ) -> None:
        self.weights, self.graphs, self.max_norm = weights, graphs, max_norm
        self.skipped_in_a_row = 0
        # The weights of the last step whose loss was finite. What came of that step may be what spoils all later ones.
        self._last_good = weights.master.clone()
        self._loss_of = loss_of
        self._loss = torch.zeros((), device=weights.master.device)
        # Of all batches of a step, in float32; the model's own type would lose what small batches add.
        of_leaves = weights.gradient
        self._gradient = of_leaves if of_leaves.dtype == torch.float32 else torch.zeros_like(weights.master)
        self._scale = GradScaler(self._loss.device) if of_leaves.dtype == torch.float16 else None
        self._average = Ema(weights, ema_decay) if ema_decay else None
        self.updater = FlatOptimizer(optimizer, weights, self._gradient, learning_rate, weight_decay)
        short = of_leaves is not self._gradient
        kernels = find_kernels(of_leaves.device, of_leaves.dtype, "lora") if short else None
        self._at_once = kernels.adamw if kernels is not None and optimizer == "AdamW" else None
        self._finished = False
        self._begun: Batch | None = None  # of the next step; its gradient is there already

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer itself."""
        return self.updater.optimizer

    @property
    def learning_rate(self) -> float:
        """Of the last step, and of the next until it is set to another."""
        return self.updater.rate

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self.updater.rate = value

    def step(self, batches: Sequence[Batch], meanwhile: Callable[[], Sequence[Batch]] = lambda: ()) -> float:
        """One step on the sum of the batches' losses, and its value; NaN where the step was left out.

        meanwhile: what the processor may do while the GPU works. It may give the batches of the next step; the GPU
        begins with the first while the processor looks at this one. Who changes weights calls clear_gradients.
        """
        if self._begun is not None and self._begun is not batches[0]:
            self.clear_gradients()
        value, overflowed = self._try(batches, meanwhile)
        while overflowed:
            if self._begun is not None:
                self.clear_gradients()
            value, overflowed = self._try(batches)
        self.skipped_in_a_row = 0 if math.isfinite(value) else self.skipped_in_a_row + 1
        return value

    def _try(
        self, batches: Sequence[Batch], meanwhile: Callable[[], Sequence[Batch]] = lambda: ()
    ) -> tuple[float, bool]:
        """One step, and whether it was left out for the scale of its gradient alone."""
        alone = len(batches) == 1 and self._at_once is not None  # then its gradient is taken as it is
        for number, batch in enumerate(batches):
            if number or self._begun is None:
                self._accumulated(batch)
            if not alone:
                self._add_gradients()
        self._begun = None
        if self.updater.on_device:
            told = self.graphs.call(self._update, alone, alone, self._changed())
        else:
            told = self._update(alone)
        read = self.graphs.async_read(told)
        for batch in meanwhile()[:1]:
            if self.graphs.is_captured(self._accumulate, batch.key) and not _learned(batch):
                self._accumulated(batch)
                self._begun = batch
        value, overflowed = read()
        return value, bool(overflowed)

    def _accumulated(self, batch: Batch) -> None:
        """Has a batch's loss and gradients added up, and hands on those of text encoders that learn."""
        gradients = self.graphs.call(self._accumulate, batch, batch.key, [self._loss, self.weights.gradient])
        if gradients:
            given = _learned(batch)  # which may be in main memory
            of_given = [gradient.to(tensor.device) for gradient, tensor in zip(gradients, given, strict=True)]
            # Kept, since the step may be done once more on the same batches.
            torch.autograd.backward(given, of_given, retain_graph=True)

    def _changed(self) -> list[Tensor]:
        """What _update changes."""
        weights = self.weights
        changed = [weights.master, weights.gradient, self._last_good, self._loss, self._gradient]
        changed += self.updater.tensors()
        if self._average:
            changed += self._average.tensors()
        return changed + self._scale.tensors() if self._scale else changed

    def _accumulate(self, batch: Batch) -> list[Tensor]:
        """Adds a batch's loss and gradients. Gives the gradients of what came from text encoders that learn."""
        loss = self._loss_of(batch)
        descended, told = loss if isinstance(loss, tuple) else (loss, loss)
        (descended * self._scale.value if self._scale else descended).backward()
        with torch.no_grad():
            self._loss += told
        return [_taken(tensor) for tensor in _learned(batch)]

    @torch.no_grad()
    def _add_gradients(self) -> None:
        """Adds those of the leaves to the sum, where that is another tensor."""
        if self._gradient is not self.weights.gradient:
            self._gradient += self.weights.gradient
            self.weights.gradient.zero_()

    def clear_gradients(self) -> None:
        """Forgets what an unfinished step has added up, and what was begun of the next."""
        self._begun = None
        for tensor in (self._loss, self._gradient, self.weights.gradient):
            tensor.zero_()

    @torch.no_grad()
    def _update(self, alone: bool) -> Tensor:
        """Changes the weights. (2,): the loss, and whether the gradient overflowed.

        alone: whether the gradient is that of the leaves, and not the sum of several.
        """
        gradient = self.weights.gradient if alone else self._gradient
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        good = torch.isfinite(self._loss) & torch.isfinite(norm)
        loss = torch.where(good, self._loss, math.nan)
        overflowed = torch.isfinite(self._loss) & ~good
        self.updater.left_out.copy_(~good)
        if self._scale:
            self.updater.divisor.copy_((norm / self._scale.value / self.max_norm).clamp_min(1) * self._scale.value)
            overflowed &= self._scale.can_shrink()
            self._scale.update(good, overflowed)
        else:
            self.updater.divisor.copy_((norm / self.max_norm).clamp_min(1))
            overflowed.zero_()
        if self._at_once is not None:
            self.updater.step_at_once(self._at_once, gradient, self._last_good)
        else:
            torch.where(good, self.weights.master, self._last_good, out=self._last_good)
            self.updater.step()
            self.weights.refresh()
            gradient.zero_()
        if self._average:
            self._average.update(good)
        self._loss.zero_()
        return torch.stack([loss, overflowed.to(loss.dtype)])

    def forget(self, factors: Iterable[Tensor]) -> None:
        """Clears the moments of factors that were redrawn: they speak of weights that are gone."""
        self.updater.forget([self.weights.span(factor) for factor in factors])

    def restart_average(self, factors: Iterable[Tensor]) -> None:
        """Has the running average begin anew at factors that were redrawn; give both factors of a layer."""
        if self._average:
            self._average.restart([self.weights.span(factor) for factor in factors])

    def restore_last_good(self) -> None:
        """Goes back to the weights of the last step whose loss was finite. The optimizer begins anew there."""
        with torch.no_grad():
            self.weights.master.copy_(self._last_good)
        self.clear_gradients()
        if self._average:
            self._average.restore_last_good()
        branches = self.weights.layers.values()
        self.forget(factor for branch in branches for factor in (branch.lora_down, branch.lora_up))
        self.weights.refresh()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Has the adapter's weights be those that the training would give now, for as long as the context lasts.

        They are others than those that it goes on from where there is a running average, or an optimizer with its own.
        """
        if self._finished or not (self._average or self.updater.shows_others):
            yield
            return
        before = self.weights.master.clone()
        self._show()
        try:
            yield
        finally:
            self.updater.hide()
            with torch.no_grad():
                self.weights.master.copy_(before)
            self.weights.refresh()

    def finish(self) -> None:
        """Puts the weights that the training gives in place of those that it could go on from, for good."""
        if not self._finished:
            self._show()
            self._finished = True

    @torch.no_grad()
    def _show(self) -> None:
        self.updater.show()
        if self._average:
            self.weights.master.copy_(self._average.value)
        self.weights.refresh()

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on besides the weights: tensors as they are, and numbers."""
        parts = {"average": self._average, "scale": self._scale, "optimizer": self.updater}
        return {
            "skipped_in_a_row": self.skipped_in_a_row,
            "last_good": self._last_good,
            **{name: part.state_dict() for name, part in parts.items() if part},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from where another one stood. Tensors are filled in place: recorded graphs know their addresses."""
        self.skipped_in_a_row = int(state["skipped_in_a_row"])
        self._last_good.copy_(torch.as_tensor(state["last_good"]))
        self.updater.load_state_dict(state["optimizer"])
        if self._average:
            self._average.load_state_dict(state["average"])
        if self._scale:
            self._scale.load_state_dict(state["scale"])


def _learned(batch: Batch) -> list[Tensor]:
    """What text encoders that learn have made of a batch's captions."""
    return [tensor for tensor in tensors_in(batch) if tensor.requires_grad]


def _taken(tensor: Tensor) -> Tensor:
    """The tensor's gradient, which it has no more."""
    gradient, tensor.grad = tensor.grad, None
    return torch.zeros_like(tensor) if gradient is None else gradient
