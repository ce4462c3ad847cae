"""Linear layer and LoRA branch as one operation, forwards and backwards.

Written as y + s · up(down(x)), a branch costs two passes over the activations that are only additions, one forwards
and one backwards. Here the products add into what the layer itself has just computed. The gradients of the factors are
added to their .grad at once, where the adapter keeps them all in one tensor.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapter_weights import Branch


class AdaptedLinear(torch.autograd.Function):
    """x (..., in) -> x Wᵀ + b + s · (x downᵀ) upᵀ (..., out), for a frozen weight W (out, in) of x's type.

    The factors may be those of a convolution of single pixels. They are given so that autograd sees that there is
    something to learn; their gradients go to .grad.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, branch: Branch):  # type: ignore[no-untyped-def]
        flat = x.reshape(-1, x.shape[-1])
        inner = flat @ down.flatten(1).t()
        output = F.linear(flat, weight, bias).addmm_(inner, up.flatten(1).t(), alpha=branch.scale)
        ctx.save_for_backward(flat, inner, weight)
        ctx.branch, ctx.shape = branch, x.shape
        # No view, since the model may add to it in place; F.linear gives one where x is not contiguous.
        return torch.ops.aten._unsafe_view(output, [*x.shape[:-1], len(weight)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor):  # type: ignore[no-untyped-def]
        flat, inner, weight = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        through = _add_gradients(ctx.branch, flat, inner, gradient)
        if not ctx.needs_input_grad[0]:
            return (None,) * 6
        down = ctx.branch.down.leaf.detach().flatten(1)
        of_input = (gradient @ weight).addmm_(through, down, alpha=ctx.branch.scale)
        return of_input.view(ctx.shape), None, None, None, None, None


class LinearBranch(torch.autograd.Function):
    """output (..., out) -> output + s · (x downᵀ) upᵀ, for layers whose own product is not ours to compute."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, down: Tensor, up: Tensor, branch: Branch):  # type: ignore[no-untyped-def]
        flat = x.reshape(-1, x.shape[-1]).to(down.dtype)
        inner = flat @ down.t()
        ctx.save_for_backward(flat, inner)
        ctx.branch, ctx.shape, ctx.dtype = branch, x.shape, x.dtype
        inner, up = inner.to(output.dtype), up.to(output.dtype)
        added = output.clone(memory_format=torch.contiguous_format)
        added.view(-1, added.shape[-1]).addmm_(inner, up.t(), alpha=branch.scale)
        return added  # no view, since the model may add to it in place

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor):  # type: ignore[no-untyped-def]
        flat, inner = ctx.saved_tensors
        leaf = ctx.branch.down.leaf.detach()
        through = _add_gradients(ctx.branch, flat, inner, gradient.reshape(-1, gradient.shape[-1]).to(leaf.dtype))
        of_input = None
        if ctx.needs_input_grad[1]:
            of_input = (through @ (leaf * ctx.branch.scale)).to(ctx.dtype).view(ctx.shape)
        return gradient, of_input, None, None, None


def _add_gradients(branch: Branch, flat: Tensor, inner: Tensor, gradient: Tensor) -> Tensor:
    """Adds the factors' gradients to their .grad, and gives gradient · up (n, rank)."""
    down, up = branch.down.leaf, branch.up.leaf
    through = gradient @ up.detach().flatten(1)
    assert down.grad is not None and up.grad is not None
    up.grad.flatten(1).addmm_(gradient.t(), inner, alpha=branch.scale)
    down.grad.flatten(1).addmm_(through.t(), flat, alpha=branch.scale)
    return through
