"""A residual sum and its layer normalisation, one kernel forward and one backward.

A residual block needs the sum and the normalised sum. One kernel computes both, and one adds up the gradients of both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernel import Draw, Kernel
from .layer_norm import norm_backward, norm_forward
from .layer_norm import supports as supports_layer_norm


def residual_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute y = x + residual, or y = x if there is none, and the layer normalisation of y.

    Args:
        x: (..., d), float32, float16 or bfloat16. Computed in float32 within.
        residual: None, or of x's shape and dtype.
        weight: (d,) of any dtype; frozen: it gets no gradient.
        bias: like weight.
        eps: added to the variance.

    Returns:
        y, and y normalised, both of x's shape and dtype.
    """
    return _ResidualNorm.apply(x, residual, weight, bias, eps)


def supports(x: Tensor, residual: Tensor | None) -> bool:
    """Rows that a program can hold, and a sum without broadcasting or promotion."""
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        return False
    return supports_layer_norm(x)


def reference(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute residual_norm in plain PyTorch."""
    y = x if residual is None else x + residual
    return y, F.layer_norm(y, weight.shape, weight, bias, eps)


def examples(draw: Draw) -> Iterator[tuple[Any, ...]]:
    """Without and with a residual."""
    yield draw(70, 320).requires_grad_(), None, draw(320), draw(320), 1e-5
    yield draw(70, 320).requires_grad_(), draw(70, 320).requires_grad_(), draw(320), draw(320), 1e-5


KERNEL = Kernel("unet", residual_norm, supports, reference, examples)


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        y, output, mean, rstd = norm_forward(x, residual, weight, bias, eps)
        ctx.save_for_backward(y, weight, mean, rstd)
        ctx.set_materialize_grads(False)
        return y, output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = grad_y if grad_output is None else norm_backward(grad_output, grad_y, *ctx.saved_tensors)
        return grad, grad if ctx.needs_input_grad[1] else None, None, None, None
