"""Linear layers and their LoRA branches as one operation, forwards and backwards.

Written as y + s · up(down(x)), a branch costs two passes over the activations that are only additions, one forwards
and one backwards. Here the products add into what the layer itself computes. The gradients of the factors are
added to their .grad at once, where the adapter keeps them all in one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..acceleration import Kernels, find_kernels
from .parameters import Factor, LoraLayer


class AdaptedLayer(NamedTuple):
    """A linear layer that is not trained, with its branch of the same type."""

    weight: Tensor  # (out, in)
    bias: Tensor | None  # (out,)
    branch: LoraLayer  # of a linear layer, or of a convolution of single pixels

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """down (rank, in) and up (out, rank)."""
        down, up = self.branch.down.compute, self.branch.up.compute
        return down.detach().flatten(1), up.detach().flatten(1)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What layers must have in common to be computed together."""
        weight, (down, _) = self.weight, self.factors
        return weight.shape, weight.dtype, weight.device, self.bias is None, down.shape, self.branch.scale


def adapted_linears(x: Tensor, layers: Sequence[AdaptedLayer]) -> tuple[Tensor, ...]:
    """x (..., in) -> x Wᵀ + b + s · (x downᵀ) upᵀ (..., out) of each layer; the layers are of one kind."""
    # The factors are given so that autograd sees that there is something to learn.
    leaves = (factor.compute for layer in layers for factor in (layer.branch.down, layer.branch.up))
    outputs: tuple[Tensor, ...] = _AdaptedLinears.apply(x, layers, *leaves)
    return outputs


class _AdaptedLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Sequence[AdaptedLayer], *leaves: Tensor) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])
        outputs, inner = _forward(flat, layers)
        ctx.save_for_backward(flat, inner)
        ctx.layers, ctx.shape = layers, x.shape
        ctx.set_materialize_grads(False)
        # No views, since the model may add to them in place; F.linear gives one where x is not contiguous.
        return tuple(torch.ops.aten._unsafe_view(each, [*x.shape[:-1], each.shape[-1]]) for each in outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        flat, inner = ctx.saved_tensors
        used = [number for number, gradient in enumerate(gradients) if gradient is not None]
        of_input = None
        if used:
            rows = [_rows(gradients[number]) for number in used]  # type: ignore[arg-type]
            inner = inner if len(used) == len(gradients) else inner[used]
            of_input = _backward(flat, inner, rows, [ctx.layers[number] for number in used], ctx.needs_input_grad[0])
        return None if of_input is None else of_input.view(ctx.shape), None, *(None for _ in range(2 * len(gradients)))


def _rows(gradient: Tensor) -> Tensor:
    """(..., out) -> (n, out), without gaps."""
    return gradient.reshape(-1, gradient.shape[-1]).contiguous()


def _forward(x: Tensor, layers: Sequence[AdaptedLayer]) -> tuple[Sequence[Tensor], Tensor]:
    """The outputs, each (n, out), and x · downᵀ (layers, n, rank)."""
    weights, biases, downs, ups = _tensors(layers)
    kernels, scale = find_kernels(x.device, x.dtype, "lora"), layers[0].branch.scale
    if kernels is not None and kernels.lora_linear.supports(x, weights, downs):
        outputs, inner = kernels.lora_linear(x, weights, biases, downs, ups, scale)
        return outputs.unbind(), inner
    inner = torch.stack([x @ down.t() for down in downs]) if len(layers) > 1 else (x @ downs[0].t())[None]
    return [
        F.linear(x, layer.weight, layer.bias).addmm_(narrow, up.t(), alpha=scale)
        for layer, narrow, up in zip(layers, inner, ups, strict=True)
    ], inner


def _backward(
    x: Tensor, inner: Tensor, gradients: list[Tensor], layers: Sequence[AdaptedLayer], wanted: bool
) -> Tensor | None:
    """The gradient of x (n, in), if it is wanted; adds those of the factors to their .grad."""
    weights, _, downs, ups = _tensors(layers)
    kernels, scale = find_kernels(x.device, x.dtype, "lora"), layers[0].branch.scale
    branches = [layer.branch for layer in layers]
    if wanted and kernels is not None and kernels.lora_linear_backward.supports(gradients, weights, downs):
        of_input, through = kernels.lora_linear_backward(gradients, weights, downs, ups, scale)
        _add_gradients(kernels, branches, x, gradients, inner, through)
        return of_input
    result: Tensor | None = None
    for number, (gradient, up) in enumerate(zip(gradients, ups, strict=True)):
        if wanted:
            result = gradient @ weights[number] if result is None else result.addmm_(gradient, weights[number])
        through = (gradient @ up)[None]
        _add_gradients(kernels, [branches[number]], x, [gradient], inner[number, None], through, result)
    return result


def _tensors(layers: Sequence[AdaptedLayer]) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Weights, biases (none where there are none), downs and ups."""
    downs, ups = zip(*(layer.factors for layer in layers), strict=True)
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return [layer.weight for layer in layers], biases, list(downs), list(ups)


def _add_gradients(
    kernels: Kernels | None,
    branches: Sequence[LoraLayer],
    x: Tensor,
    gradients: Sequence[Tensor],
    inner: Tensor,
    through: Tensor,
    of_input: Tensor | None = None,
) -> None:
    """Adds the gradients of branches' factors to their .grad, and that of x to of_input, if it is given.

    x: (n, in); gradients: (n, out) each; inner = x · downᵀ and through = gradient · up: (branches, n, rank). of_input:
    (n, in), for a single branch.
    """
    downs = [branch.down.compute.detach().flatten(1) for branch in branches]
    of_downs, of_ups = [_gradient(branch.down) for branch in branches], [_gradient(branch.up) for branch in branches]
    scale = branches[0].scale
    if kernels is not None and kernels.lora_linear_gradients.supports(x, gradients, of_downs):
        kernels.lora_linear_gradients(x, gradients, inner, through, of_downs, of_ups, scale, of_input, downs[0])
        return
    for number, gradient in enumerate(gradients):
        of_ups[number].addmm_(gradient.t(), inner[number], alpha=scale)
        of_downs[number].addmm_(through[number].t(), x, alpha=scale)
    if of_input is not None:
        of_input.addmm_(through[0], downs[0], alpha=scale)


def _gradient(factor: Factor) -> Tensor:
    """What is added up for a factor, with one row for each of its own."""
    assert factor.compute.grad is not None
    return factor.compute.grad.flatten(1)


class LinearBranch(torch.autograd.Function):
    """output (..., out) -> output + s · (x downᵀ) upᵀ, for layers whose own product is not ours to compute."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, down: Tensor, up: Tensor, branch: LoraLayer):  # type: ignore[no-untyped-def]
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
        leaf, up = ctx.branch.down.compute, ctx.branch.up.compute.detach()
        rows = _rows(gradient).to(leaf.dtype)
        of_input = torch.zeros_like(flat) if ctx.needs_input_grad[1] else None
        kernels, through = find_kernels(rows.device, rows.dtype, "lora"), (rows @ up)[None]
        _add_gradients(kernels, [ctx.branch], flat, [rows], inner[None], through, of_input)
        return gradient, None if of_input is None else of_input.to(ctx.dtype).view(ctx.shape), None, None, None
