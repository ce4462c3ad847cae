"""The update of an adapter's weights from an accumulated gradient: clipping, optimizer, EMA."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..acceleration import CudaGraphRunner, Kernel, find_kernels
from ..lora import FlatParameters
from .ema import Ema
from .flat_optimizer import FlatOptimizer
from .grad_scaler import GradScaler
from .gradients import GradientAccumulator


class WeightUpdate:
    """Updates the weights, unless the loss or the gradient is not finite.

    Whether the step counts, and how far its gradient is clipped, is decided on the device, so that the CPU never waits
    for the GPU in between. Longer than most classes, as the captured update and the weights that it can fall back to
    belong together: what one changes, the other has to restore.

    Args:
        gradients: the accumulated loss and gradient.
        optimizer: applied to `gradients`.
        max_norm: gradients with a larger norm are scaled down to it.
        scaler: adapts the loss scale of float16 models, or None.
        ema: averages the weights, or None.
    """

    def __init__(
        self,
        weights: FlatParameters,
        gradients: GradientAccumulator,
        optimizer: FlatOptimizer,
        max_norm: float,
        scaler: GradScaler | None,
        ema: Ema | None,
    ) -> None:
        self._weights = weights
        self._gradients = gradients
        self._optimizer = optimizer
        self._max_norm = max_norm
        self._scaler = scaler
        self._ema = ema
        # The weights before the last finite step, as its result may be the cause if all later losses are not finite.
        self._last_good = weights.master.clone()
        self._fused_adamw = _find_fused_adamw(weights) if optimizer.spec.has_fused_kernel else None

    @property
    def takes_model_dtype(self) -> bool:
        """Whether run can read weights.gradient in the model's dtype."""
        return self._fused_adamw is not None

    def run(self, graphs: CudaGraphRunner, in_model_dtype: bool) -> Tensor:
        """Update the weights once and clear the accumulated loss and gradient.

        Args:
            graphs: captures the update, if the optimizer allows that.
            in_model_dtype: read the gradient from weights.gradient in place of the float32 sum.

        Returns:
            (2,) on the device: the loss, NaN if the step was skipped; and 1 if it was skipped because its gradient
            overflowed at a loss scale that has been halved since, else 0.
        """
        if not self._optimizer.on_device:
            return self._update(in_model_dtype)
        result: Tensor = graphs.call(self._update, in_model_dtype, in_model_dtype, self._changes())
        return result

    def _changes(self) -> list[Tensor]:
        """Tensors that _update changes in place."""
        weights, gradients = self._weights, self._gradients
        changes = [weights.master, weights.gradient, self._last_good, gradients.loss, gradients.gradient]
        changes += self._optimizer.tensors()
        if self._ema:
            changes += self._ema.tensors()
        if self._scaler:
            changes += self._scaler.tensors()
        return changes

    @torch.no_grad()
    def _update(self, in_model_dtype: bool) -> Tensor:
        gradient = self._weights.gradient if in_model_dtype else self._gradients.gradient
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        finite_loss = torch.isfinite(self._gradients.loss)
        good = finite_loss & torch.isfinite(norm)
        loss = torch.where(good, self._gradients.loss, math.nan)
        overflowed = finite_loss & ~good
        self._optimizer.skip.copy_(~good)
        self._set_divisor(norm, good, overflowed)
        self._step(gradient, good)
        if self._ema:
            self._ema.update(good)
        self._gradients.loss.zero_()
        return torch.stack([loss, overflowed.to(loss.dtype)])

    def _set_divisor(self, norm: Tensor, good: Tensor, overflowed: Tensor) -> None:
        """Set the gradient's divisor: the clipping factor max(1, norm / max_norm) times the loss scale.

        Clears `overflowed` where a smaller loss scale would not help.
        """
        divisor = self._optimizer.divisor
        if self._scaler is None:
            divisor.copy_((norm / self._max_norm).clamp_min(1))
            overflowed.zero_()
            return
        scale = self._scaler.value
        divisor.copy_((norm / scale / self._max_norm).clamp_min(1) * scale)
        overflowed &= self._scaler.can_shrink()
        self._scaler.update(good, overflowed)

    def _step(self, gradient: Tensor, good: Tensor) -> None:
        """Save the weights, update them and their copy in the model's dtype, and clear the gradient."""
        if self._fused_adamw is not None:
            self._optimizer.fused_step(self._fused_adamw, gradient, self._last_good)
            return
        torch.where(good, self._weights.master, self._last_good, out=self._last_good)
        self._optimizer.step()
        self._weights.refresh()
        gradient.zero_()

    def reset_state(self, factors: Iterable[Tensor]) -> None:
        """Reset the optimizer state of these factors."""
        self._optimizer.reset_state(self._weights.span(factor) for factor in factors)

    def restart_ema(self, factors: Iterable[Tensor]) -> None:
        """Restart the EMA at the current values of these factors."""
        if self._ema:
            self._ema.restart(self._weights.span(factor) for factor in factors)

    def restore_last_good(self) -> None:
        """Restore weights and EMA from before the last finite step, with a fresh optimizer state."""
        with torch.no_grad():
            self._weights.master.copy_(self._last_good)
        self._gradients.clear()
        if self._ema:
            self._ema.restore_last_good()
        layers = self._weights.layers.values()
        self.reset_state(factor for layer in layers for factor in (layer.lora_down, layer.lora_up))
        self._weights.refresh()

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint besides the weights; the tensors are not copied."""
        state: dict[str, Any] = {"last_good": self._last_good}
        if self._ema:
            state["average"] = self._ema.state_dict()
        if self._scaler:
            state["scale"] = self._scaler.state_dict()
        state["optimizer"] = self._optimizer.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state_dict. Tensors are filled in place, as captured graphs hold their addresses."""
        self._last_good.copy_(torch.as_tensor(state["last_good"]))
        self._optimizer.load_state_dict(state["optimizer"])
        if self._ema:
            self._ema.load_state_dict(state["average"])
        if self._scaler:
            self._scaler.load_state_dict(state["scale"])


def _find_fused_adamw(weights: FlatParameters) -> Kernel[..., ..., None] | None:
    """The fused AdamW kernel, for models that compute in less than float32."""
    if weights.gradient.dtype == torch.float32:
        return None
    kernels = find_kernels(weights.gradient.device, weights.gradient.dtype, "lora")
    return None if kernels is None else kernels.adamw
