"""Linear layer and LoRA branch as one operation, forward and backward.

Written as y + s · up(down(x)), a branch costs two passes over the activations that only add, one forward and one
backward. Here its matrix products accumulate into the layer's own output and input gradient. The gradients of the
factors are added to their .grad directly, which is part of the flat gradient.

Names: x_down = x · downᵀ (n, rank) and grad_up = grad_out · up (n, rank), the narrow intermediates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..acceleration import find_kernels, is_kept, keep_pace
from .dense_weight import dense_weight
from .parameters import Factor, LoraLayer

# If a layer's output is more than this many times as wide as its input, the branch is written first and the product is
# added to it, as changing so wide an output takes longer than writing it (bench/README.md).
_WIDE = 4


class AdaptedLayer(NamedTuple):
    """A frozen linear layer and its branch.

    A weight in another dtype than the branch computes in, or in a quantised format, is converted in the forward pass
    and again in the backward pass, and not kept in between.
    """

    weight: Tensor  # (out, in)
    bias: Tensor | None  # (out,)
    branch: LoraLayer  # of a linear layer, or of a 1x1 convolution

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that layer and branch compute in."""
        return self.branch.down.compute.dtype

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """down (rank, in) and up (out, rank), detached."""
        down = self.branch.down.compute.detach().flatten(1)
        up = self.branch.up.compute.detach().flatten(1)
        return down, up

    @property
    def kind(self) -> tuple[Any, ...]:
        """Properties in which layers must agree to be computed together."""
        down, _ = self.factors
        weight = self.weight
        return weight.shape, weight.dtype, weight.device, self.bias is None, down.shape, self.branch.scale


def adapted_linears(x: Tensor, layers: Sequence[AdaptedLayer]) -> tuple[Tensor, ...]:
    """Compute x Wᵀ + b + s · (x downᵀ) upᵀ for several layers with the same input.

    Args:
        x: (..., in).
        layers: one to MAX_LAYERS layers of equal `kind`.

    Returns:
        (..., out) of each layer.
    """
    # Autograd only calls backward if an input requires a gradient, so the factors are inputs.
    factors = [factor.compute for layer in layers for factor in (layer.branch.down, layer.branch.up)]
    outputs: tuple[Tensor, ...] = _AdaptedLinears.apply(x, layers, *factors)
    return outputs


class _AdaptedLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Sequence[AdaptedLayer], *factors: Tensor) -> tuple[Tensor, ...]:
        """Return the output with the branch added."""
        keep_pace()
        rows = x.reshape(-1, x.shape[-1])
        outputs, x_down = _forward(rows, layers)
        ctx.save_for_backward(rows, x_down)
        ctx.layers, ctx.shape = layers, x.shape
        ctx.set_materialize_grads(False)
        # No views, since the model may add to the outputs in place; F.linear returns one where x is not contiguous.
        return tuple(torch.ops.aten._unsafe_view(output, [*x.shape[:-1], output.shape[-1]]) for output in outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradient of the input; those of the factors are added in place."""
        no_factor_grads = (None,) * (2 * len(grad_outputs))  # they are added to .grad
        used = [index for index, gradient in enumerate(grad_outputs) if gradient is not None]
        if not used:
            return None, None, *no_factor_grads
        keep_pace()
        x, x_down = ctx.saved_tensors
        if len(used) < len(grad_outputs):
            x_down = x_down[used]
        grad_rows = [_rows(grad_outputs[index]) for index in used]  # type: ignore[arg-type]
        layers = [ctx.layers[index] for index in used]
        grad_input = _backward(x, x_down, grad_rows, layers, ctx.needs_input_grad[0])
        return None if grad_input is None else grad_input.view(ctx.shape), None, *no_factor_grads


def _rows(gradient: Tensor) -> Tensor:
    """(..., out) -> (n, out), contiguous."""
    return gradient.reshape(-1, gradient.shape[-1]).contiguous()


def _forward(x: Tensor, layers: Sequence[AdaptedLayer]) -> tuple[Sequence[Tensor], Tensor]:
    """Return the output (n, out) of each layer, and x_down (layers, n, rank)."""
    weights, downs, ups = _tensors(layers)
    biases = [dense_weight(layer.bias, layer.dtype) for layer in layers if layer.bias is not None]  # of none or of all
    scale = layers[0].branch.scale
    kernels = find_kernels(x.device, x.dtype, "lora")
    if kernels is not None and kernels.lora_linear.supports(x, weights, downs):
        stacked, x_down = kernels.lora_linear(x, weights, biases, downs, ups, scale)
        return stacked.unbind(), x_down
    x_down = torch.stack([x @ down.t() for down in downs]) if len(layers) > 1 else (x @ downs[0].t())[None]
    outputs = []
    for index, (weight, h, up) in enumerate(zip(weights, x_down, ups, strict=True)):
        outputs.append(_output(x, weight, biases[index] if biases else None, h, up, scale))
    return outputs, x_down


def _output(x: Tensor, weight: Tensor, bias: Tensor | None, x_down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Return x Wᵀ + b + s · x_down upᵀ, (n, out)."""
    outputs, inputs = weight.shape
    if outputs > _WIDE * inputs:
        branch = (x_down * scale) @ up.t() if bias is None else torch.addmm(bias, x_down * scale, up.t())
        return branch.addmm_(x, weight.t())
    output = F.linear(x, weight, bias)
    add = torch.addmm if is_kept(inputs, outputs) else torch.Tensor.addmm_
    return add(output, x_down, up.t(), alpha=scale)


def _backward(
    x: Tensor, x_down: Tensor, grad_outputs: list[Tensor], layers: Sequence[AdaptedLayer], needs_grad_input: bool
) -> Tensor | None:
    """Return the gradient of x (n, in), if needed, and add those of the factors to their .grad."""
    weights, downs, ups = _tensors(layers)
    branches = [layer.branch for layer in layers]
    kernels = find_kernels(x.device, x.dtype, "lora")
    if needs_grad_input and kernels is not None and kernels.lora_linear_backward.supports(grad_outputs, weights, downs):
        grad_input, grad_up = kernels.lora_linear_backward(grad_outputs, weights, downs, ups, branches[0].scale)
        _add_gradients(branches, x, grad_outputs, x_down, grad_up)
        return grad_input
    result: Tensor | None = None
    for index, (gradient, up) in enumerate(zip(grad_outputs, ups, strict=True)):
        if needs_grad_input:
            result = gradient @ weights[index] if result is None else result.addmm_(gradient, weights[index])
        grad_up = (gradient @ up)[None]
        _add_gradients([branches[index]], x, [gradient], x_down[index, None], grad_up, result)
    return result


def _tensors(layers: Sequence[AdaptedLayer]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Weights, downs and ups, all in the dtype that the layers compute in."""
    downs, ups = zip(*(layer.factors for layer in layers), strict=True)
    return [dense_weight(layer.weight, layer.dtype) for layer in layers], list(downs), list(ups)


def _add_gradients(
    branches: Sequence[LoraLayer],
    x: Tensor,
    grad_outputs: Sequence[Tensor],
    x_down: Tensor,
    grad_up: Tensor,
    grad_input: Tensor | None = None,
) -> None:
    """Add the gradients of the branches' factors to their .grad, and the branch's share to grad_input.

    Args:
        branches: of layers with the same input.
        x: (n, in).
        grad_outputs: (n, out) of each branch.
        x_down: (branches, n, rank).
        grad_up: (branches, n, rank).
        grad_input: (n, in) gradient of x to add to, for a single branch; or None.
    """
    scale = branches[0].scale
    downs = [branch.down.compute.detach().flatten(1) for branch in branches]
    grad_downs = [_gradient(branch.down) for branch in branches]
    grad_ups = [_gradient(branch.up) for branch in branches]
    kernels = find_kernels(x.device, x.dtype, "lora")
    if kernels is not None and kernels.lora_linear_gradients.supports(x, grad_outputs, grad_downs):
        kernels.lora_linear_gradients(
            x, grad_outputs, x_down, grad_up, grad_downs, grad_ups, scale, grad_input, downs[0]
        )
        return
    for index, gradient in enumerate(grad_outputs):
        grad_ups[index].addmm_(gradient.t(), x_down[index], alpha=scale)
        grad_downs[index].addmm_(grad_up[index].t(), x, alpha=scale)
    if grad_input is not None:
        grad_input.addmm_(grad_up[0], downs[0], alpha=scale)


def _gradient(factor: Factor) -> Tensor:
    """The factor's accumulated gradient as a matrix."""
    assert factor.compute.grad is not None
    return factor.compute.grad.flatten(1)


class ConvertedLinear(torch.autograd.Function):
    """x Wᵀ + b in the dtype of x (..., in); a weight of another dtype is converted in each pass, and not kept.

    A text encoder of float16 weights that computes in float32 would keep its weights a second time for each caption.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the output (..., out)."""
        ctx.weight = weight
        return F.linear(x, dense_weight(weight, x.dtype), None if bias is None else dense_weight(bias, x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor):  # type: ignore[no-untyped-def]
        """Return the gradient of the input."""
        return grad_output @ dense_weight(ctx.weight, grad_output.dtype), None, None


class LinearBranch(torch.autograd.Function):
    """output (..., out) -> output + s · (x downᵀ) upᵀ, for layers that compute their own product.

    Such are layers that quantise their input too.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, down: Tensor, up: Tensor, branch: LoraLayer):  # type: ignore[no-untyped-def]
        """Return the output with the branch added."""
        keep_pace()
        rows = x.reshape(-1, x.shape[-1]).to(down.dtype)
        x_down = rows @ down.t()
        ctx.save_for_backward(rows, x_down)
        ctx.branch, ctx.shape, ctx.dtype = branch, x.shape, x.dtype
        result = output.clone(memory_format=torch.contiguous_format)  # no view, since the model may add to it in place
        result.view(-1, result.shape[-1]).addmm_(x_down.to(output.dtype), up.to(output.dtype).t(), alpha=branch.scale)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor):  # type: ignore[no-untyped-def]
        """Return the gradient of the input; those of the factors are added in place."""
        keep_pace()
        x, x_down = ctx.saved_tensors
        branch = ctx.branch
        grad_rows = _rows(grad_output).to(branch.down.compute.dtype)
        grad_up = grad_rows @ branch.up.compute.detach()
        grad_input = torch.zeros_like(x) if ctx.needs_input_grad[1] else None
        _add_gradients([branch], x, [grad_rows], x_down[None], grad_up[None], grad_input)
        if grad_input is not None:
            grad_input = grad_input.to(ctx.dtype).view(ctx.shape)
        return grad_output, grad_input, None, None, None
