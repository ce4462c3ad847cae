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
from .kernels import find_kernels


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
        of_input = gradient @ weight if ctx.needs_input_grad[0] else None
        way_back(ctx.branch, flat, inner, gradient, of_input)
        return None if of_input is None else of_input.view(ctx.shape), None, None, None, None, None


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
        leaf = ctx.branch.down.leaf
        rows = gradient.reshape(-1, gradient.shape[-1]).to(leaf.dtype)
        of_input = torch.zeros_like(flat) if ctx.needs_input_grad[1] else None
        way_back(ctx.branch, flat, inner, rows, of_input)
        return gradient, None if of_input is None else of_input.to(ctx.dtype).view(ctx.shape), None, None, None


def way_back(branch: Branch, x: Tensor, inner: Tensor, gradient: Tensor, of_input: Tensor | None) -> None:
    """Adds the gradients of a branch: of its factors to their .grad, and of x to of_input, if that is wanted.

    x: (n, in), inner = x · downᵀ: (n, rank), gradient: (n, out).
    """
    down, up = (factor.leaf.detach().flatten(1) for factor in (branch.down, branch.up))
    assert branch.down.leaf.grad is not None and branch.up.leaf.grad is not None
    of_down, of_up = branch.down.leaf.grad.flatten(1), branch.up.leaf.grad.flatten(1)
    kernels, rank = find_kernels(gradient.device, gradient.dtype), len(down)
    if kernels is not None and kernels.take_output(gradient, rank):
        through = kernels.through_output(gradient, inner, up, of_up, branch.scale)
    else:
        through = gradient @ up
        of_up.addmm_(gradient.t(), inner, alpha=branch.scale)
    if kernels is not None and kernels.take_input(x, rank):
        kernels.through_input(of_input, x, through, down, of_down, branch.scale)
        return
    of_down.addmm_(through.t(), x, alpha=branch.scale)
    if of_input is not None:
        of_input.addmm_(through, down, alpha=branch.scale)
