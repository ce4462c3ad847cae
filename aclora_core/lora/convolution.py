"""Convolution and LoRA branch as one operation, forwards and backwards; see branch_function.py for why.

cuDNN's fast kernels want the channels last, and turn their operands around at each call. Here the picture is turned
once for the layer and its branch, and the frozen weight once for the whole training, in its own memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..acceleration import ConvParams, find_kernels
from .linear import AdaptedLayer, adapted_linears
from .parameters import LoraLayer

_TURNED = 64  # outputs of a layer whose weights are turned at a time, so that it takes next to no memory


def can_adapt(layer: nn.Module) -> bool:
    """Whether adapted_convolution knows this kind of layer."""
    return isinstance(layer, nn.Conv2d) and isinstance(layer.padding, tuple)


def adapted_convolution(layer: nn.Conv2d, branch: LoraLayer) -> Callable[[Tensor], Tensor]:
    """The layer's forward with its branch in it; the weight must be of the type of the branch's leaves."""
    down, up = branch.down.compute, branch.up.compute
    if _is_pointwise(layer):
        weight = layer.weight.flatten(1)
        return lambda x: _pointwise(x, weight, layer.bias, down, up, branch)
    steps = ConvParams(layer.stride, layer.padding, layer.dilation)  # type: ignore[arg-type]
    return lambda x: AdaptedConvolution.apply(x, layer.weight, layer.bias, down, up, branch, steps)


@contextmanager
def channels_last(layer: nn.Conv2d) -> Iterator[None]:
    """Has the numbers of the layer's weight stand channels last in the memory in which they are, and puts them back."""
    own = layer.weight
    if _is_pointwise(layer) or not own.is_contiguous():
        yield
        return
    channels, height, width = own.shape[1:]
    strides = channels * height * width, 1, width * channels, channels
    turned = own.detach().as_strided(own.shape, strides)
    _rearrange(own.detach(), turned)
    layer.weight = nn.Parameter(turned, requires_grad=False)
    try:
        yield
    finally:
        _rearrange(layer.weight.detach(), own.detach())
        layer.weight = own


def _rearrange(source: Tensor, target: Tensor) -> None:
    """Copies between two orders of the same memory."""
    for given, taken in zip(source.split(_TURNED), target.split(_TURNED), strict=True):
        taken.copy_(given.clone())


def _is_pointwise(layer: nn.Conv2d) -> bool:
    return layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.padding == (0, 0)


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, branch: LoraLayer) -> Tensor:
    """A convolution of single pixels is a matrix product, in whatever order the picture is."""
    if x.is_contiguous():
        return AdaptedPointwise.apply(x, weight, bias, down, up, branch)
    (output,) = adapted_linears(x.permute(0, 2, 3, 1), [AdaptedLayer(weight, bias, branch)])
    return output.permute(0, 3, 1, 2)


class AdaptedConvolution(torch.autograd.Function):
    """x (n, in, h, w) -> W * x + b + s · up(down * x) (n, out, h', w'), * a convolution, channels last in memory."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        branch: LoraLayer,
        steps: ConvParams,
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        narrow = down.contiguous(memory_format=torch.channels_last)  # as it is
        kernels = find_kernels(x.device, x.dtype, "unet")
        if kernels is not None and kernels.lora_conv.supports(x, down, up):
            output = F.conv2d(x, weight, None, *steps).contiguous(memory_format=torch.channels_last)
            inner = kernels.lora_conv(output, bias, x, narrow, up.flatten(1), steps, branch.scale)
        else:
            output = F.conv2d(x, weight, bias, *steps).contiguous(memory_format=torch.channels_last)
            inner = _rows(F.conv2d(x, narrow, None, *steps))
            _rows(output).addmm_(inner, up.flatten(1).t(), alpha=branch.scale)
        ctx.save_for_backward(x, inner, weight, narrow)
        ctx.branch, ctx.steps = branch, steps
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, weight, narrow = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_input = None
        if ctx.needs_input_grad[0]:
            of_input = _backward(gradient, x, weight, ctx.steps, (True, False))[0]
            of_input = of_input.contiguous(memory_format=torch.channels_last)
        _add_gradients(ctx.branch, x, gradient, inner, narrow, of_input, ctx.steps)
        return of_input, None, None, None, None, None, None


def _add_gradients(
    branch: LoraLayer,
    x: Tensor,
    gradient: Tensor,
    inner: Tensor,
    narrow: Tensor,
    of_input: Tensor | None,
    steps: ConvParams,
) -> None:
    """Adds the gradients of the factors to their .grad, and that of x to of_input, if it is wanted.

    inner: down * x as rows; narrow: down, channels last in memory as x, the gradient and of_input are.
    """
    down, up = branch.down.compute, branch.up.compute
    assert down.grad is not None and up.grad is not None
    rows, of_up = _rows(gradient), up.grad.flatten(1)
    through = rows @ up.detach().flatten(1)
    kernels = find_kernels(x.device, x.dtype, "unet")
    if kernels is not None and kernels.lora_conv_gradients.supports(x, gradient, down):
        kernels.lora_conv_gradients(
            x, gradient, inner, through, narrow, down.grad, of_up, of_input, steps, branch.scale
        )
        return
    of_up.addmm_(rows.t(), inner, alpha=branch.scale)
    n, _, *size = gradient.shape
    through = through.mul_(branch.scale).view(n, *size, -1).permute(0, 3, 1, 2)
    added, of_down = _backward(through, x, narrow, steps, (of_input is not None, True))
    down.grad.add_(of_down)
    if of_input is not None:
        of_input.add_(added)


class AdaptedPointwise(torch.autograd.Function):
    """x (n, in, h, w) -> W x + b + s · up(down x) (n, out, h, w) at every pixel, for pictures with channels first."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, branch: LoraLayer
    ) -> Tensor:
        flat = x.flatten(2)
        inner = down.flatten(1) @ flat
        output = weight @ flat if bias is None else torch.baddbmm(bias[:, None], _each(weight, flat), flat)
        output.baddbmm_(_each(up.flatten(1), flat), inner, alpha=branch.scale)
        ctx.save_for_backward(flat, inner, weight)
        ctx.branch = branch
        return torch.ops.aten._unsafe_view(output, [len(x), -1, *x.shape[2:]])  # no view: the model may change it

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        flat, inner, weight = ctx.saved_tensors
        down, up, scale = ctx.branch.down.compute, ctx.branch.up.compute, ctx.branch.scale
        size = gradient.shape[2:]
        gradient = gradient.flatten(2)
        through = up.detach().flatten(1).t() @ gradient
        up.grad.flatten(1).add_((gradient @ inner.mT).sum(0), alpha=scale)
        down.grad.flatten(1).add_((through @ flat.mT).sum(0), alpha=scale)
        if not ctx.needs_input_grad[0]:
            return (None,) * 6
        of_input = weight.t() @ gradient
        of_input.baddbmm_(_each(down.detach().flatten(1).t(), through), through, alpha=scale)
        return of_input.view(len(of_input), -1, *size), None, None, None, None, None


def _rows(picture: Tensor) -> Tensor:
    """(n, c, h, w) with the channels last in memory -> the same memory as (n · h · w, c)."""
    return picture.permute(0, 2, 3, 1).reshape(-1, picture.shape[1])


def _each(matrix: Tensor, batch: Tensor) -> Tensor:
    """One matrix for every item of a batch, without a copy."""
    return matrix.expand(len(batch), *matrix.shape)


def _backward(
    gradient: Tensor, x: Tensor, weight: Tensor, steps: ConvParams, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """The gradients of a convolution's input and weight, as far as wanted."""
    return torch.ops.aten.convolution_backward(
        gradient, x, weight, None, steps.stride, steps.padding, steps.dilation, False, (0, 0), 1, (*wanted, False)
    )[:2]
