"""Convolution and LoRA branch as one operation, forward and backward; linear.py says why.

cuDNN's fast kernels read channels-last memory, and convert their operands in every call if they are not. Here the
activations are converted once for the layer and its branch, and the frozen weight once for the whole training, in its
own memory.

Names: x_down = down * x and grad_up = upᵀ · grad_out are the rank-wide intermediates, as in linear.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..acceleration import ConvParams, find_kernels, keep_pace
from .linear import AdaptedLayer, adapted_linears
from .parameters import LoraLayer

_CHUNK = 64  # output channels whose weights are reordered at a time, so that it takes next to no memory


class AdaptedConv(NamedTuple):
    """A frozen convolution and its branch, whose compute dtype is that of the weight."""

    weight: Tensor  # (out, in, kh, kw), channels-last in memory
    bias: Tensor | None  # (out,)
    branch: LoraLayer
    params: ConvParams


def can_adapt(layer: nn.Module) -> bool:
    """Return whether adapted_convolution supports a layer."""
    return isinstance(layer, nn.Conv2d) and isinstance(layer.padding, tuple)


def adapted_convolution(layer: nn.Conv2d, branch: LoraLayer) -> Callable[[Tensor], Tensor]:
    """Return a forward that computes a convolution and its branch.

    Args:
        layer: a convolution that can_adapt, within channels_last.
        branch: its branch; the compute dtype must be the weight's.
    """
    down = branch.down.compute
    up = branch.up.compute
    if _is_pointwise(layer):
        # Read at each call, as the weights of a streamed block may move to another place.
        return lambda x: _pointwise(x, AdaptedLayer(layer.weight.flatten(1), layer.bias, branch))
    params = ConvParams(layer.stride, layer.padding, layer.dilation)  # type: ignore[arg-type]
    return lambda x: AdaptedConvolution.apply(x, down, up, AdaptedConv(layer.weight, layer.bias, branch, params))


@contextmanager
def channels_last(layer: nn.Conv2d) -> Iterator[None]:
    """Convert a layer's weight to channels_last in its own memory, and restore it on exit."""
    own = layer.weight
    in_order = own.is_contiguous(memory_format=torch.channels_last)
    if _is_pointwise(layer) or in_order or not own.is_contiguous():
        yield
        return
    channels, height, width = own.shape[1:]
    strides = (channels * height * width, 1, width * channels, channels)
    converted = own.detach().as_strided(own.shape, strides)
    _reorder(own.detach(), converted)
    layer.weight = nn.Parameter(converted, requires_grad=False)
    try:
        yield
    finally:
        _reorder(layer.weight.detach(), own.detach())
        layer.weight = own


def _reorder(source: Tensor, target: Tensor) -> None:
    """Copy between two memory orders of the same memory, chunk by chunk."""
    for source_chunk, target_chunk in zip(source.split(_CHUNK), target.split(_CHUNK), strict=True):
        target_chunk.copy_(source_chunk.clone())


def _is_pointwise(layer: nn.Conv2d) -> bool:
    return layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.padding == (0, 0)


def _pointwise(x: Tensor, layer: AdaptedLayer) -> Tensor:
    """A 1x1 convolution as a matrix product, in the memory order that x has."""
    if x.is_contiguous():
        branch = layer.branch
        output: Tensor = AdaptedPointwise.apply(x, branch.down.compute, branch.up.compute, layer)
        return output
    (output,) = adapted_linears(x.permute(0, 2, 3, 1), [layer])
    return output.permute(0, 3, 1, 2)


class AdaptedConvolution(torch.autograd.Function):
    """x (n, in, h, w) -> W * x + b + s · up(down * x) (n, out, h', w'), * a convolution, channels-last in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, conv: AdaptedConv) -> Tensor:
        """Return the output with the branch added."""
        keep_pace()
        weight, bias, branch, params = conv
        x = x.contiguous(memory_format=torch.channels_last)
        down = down.contiguous(memory_format=torch.channels_last)  # no copy: factors are stored so
        kernels = find_kernels(x.device, x.dtype, "unet")
        if kernels is not None and kernels.lora_conv.supports(x, down, up):
            output = F.conv2d(x, weight, None, *params).contiguous(memory_format=torch.channels_last)
            x_down = kernels.lora_conv(output, bias, x, down, up.flatten(1), params, branch.scale)
        else:
            output = F.conv2d(x, weight, bias, *params).contiguous(memory_format=torch.channels_last)
            x_down = _rows(F.conv2d(x, down, None, *params))
            _rows(output).addmm_(x_down, up.flatten(1).t(), alpha=branch.scale)
        ctx.save_for_backward(x, x_down, weight, down)
        ctx.conv = conv
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the input; those of the factors are added in place."""
        keep_pace()
        x, x_down, weight, down = ctx.saved_tensors
        grad_output = grad_output.contiguous(memory_format=torch.channels_last)
        grad_input = None
        if ctx.needs_input_grad[0]:
            grad_input, _ = _conv_backward(grad_output, x, weight, ctx.conv.params, (True, False))
            grad_input = grad_input.contiguous(memory_format=torch.channels_last)
        _add_gradients(ctx.conv, x, grad_output, x_down, down, grad_input)
        return grad_input, None, None, None


def _add_gradients(
    conv: AdaptedConv, x: Tensor, grad_output: Tensor, x_down: Tensor, down: Tensor, grad_input: Tensor | None
) -> None:
    """Add the gradients of the factors to their .grad, and the branch's share to grad_input.

    Args:
        conv: the convolution and its branch.
        x: (n, in, h, w); as grad_output, down and grad_input channels-last in memory.
        grad_output: (n, out, h', w').
        x_down: (n · h' · w', rank), the output of down as rows.
        down: (rank, in, kh, kw).
        grad_input: (n, in, h, w) to add to, or None.
    """
    branch, params = conv.branch, conv.params
    scale = branch.scale
    down_grad = branch.down.compute.grad
    up_grad = branch.up.compute.grad
    assert down_grad is not None and up_grad is not None
    up_grad = up_grad.flatten(1)
    grad_rows = _rows(grad_output)
    grad_up = grad_rows @ branch.up.compute.detach().flatten(1)
    kernels = find_kernels(x.device, x.dtype, "unet")
    if kernels is not None and kernels.lora_conv_gradients.supports(x, grad_output, down):
        kernels.lora_conv_gradients(
            x, grad_output, x_down, grad_up, down, down_grad, up_grad, grad_input, params, scale
        )
        return
    up_grad.addmm_(grad_rows.t(), x_down, alpha=scale)
    n, _, *size = grad_output.shape
    grad_up = grad_up.mul_(scale).view(n, *size, -1).permute(0, 3, 1, 2)
    added_input, added_down = _conv_backward(grad_up, x, down, params, (grad_input is not None, True))
    down_grad.add_(added_down)
    if grad_input is not None:
        grad_input.add_(added_input)


class AdaptedPointwise(torch.autograd.Function):
    """x (n, in, h, w) -> W x + b + s · up(down x) (n, out, h, w) at every pixel, for channels-first activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, layer: AdaptedLayer) -> Tensor:
        """Return the output with the branch added."""
        keep_pace()
        weight, bias, branch = layer
        pixels = x.flatten(2)
        x_down = down.flatten(1) @ pixels
        output = weight @ pixels if bias is None else torch.baddbmm(bias[:, None], _expand(weight, pixels), pixels)
        output.baddbmm_(_expand(up.flatten(1), pixels), x_down, alpha=branch.scale)
        ctx.save_for_backward(pixels, x_down, weight)
        ctx.branch = branch
        # No view, since the model may change it in place.
        result: Tensor = torch.ops.aten._unsafe_view(output, [len(x), -1, *x.shape[2:]])
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the input; those of the factors are added in place."""
        keep_pace()
        pixels, x_down, weight = ctx.saved_tensors
        branch = ctx.branch
        scale = branch.scale
        down, up = branch.down.compute, branch.up.compute
        size = grad_output.shape[2:]
        grad_output = grad_output.flatten(2)
        grad_up = up.detach().flatten(1).t() @ grad_output
        up.grad.flatten(1).add_((grad_output @ x_down.mT).sum(0), alpha=scale)
        down.grad.flatten(1).add_((grad_up @ pixels.mT).sum(0), alpha=scale)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        grad_input = weight.t() @ grad_output
        grad_input.baddbmm_(_expand(down.detach().flatten(1).t(), grad_up), grad_up, alpha=scale)
        return grad_input.view(len(grad_input), -1, *size), None, None, None


def _rows(image: Tensor) -> Tensor:
    """View channels-last (n, c, h, w) as (n · h · w, c)."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def _expand(matrix: Tensor, batch: Tensor) -> Tensor:
    """Repeat a matrix for every item of a batch, without a copy."""
    return matrix.expand(len(batch), *matrix.shape)


def _conv_backward(
    grad_output: Tensor, x: Tensor, weight: Tensor, params: ConvParams, output_mask: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Return the gradients of a convolution's input and weight; those that the mask leaves out are None."""
    grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_output,
        x,
        weight,
        None,
        params.stride,
        params.padding,
        params.dilation,
        False,
        (0, 0),
        1,
        (*output_mask, False),
    )
    return grad_input, grad_weight
