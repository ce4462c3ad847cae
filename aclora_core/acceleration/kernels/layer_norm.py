"""Layer normalisation, and a residual sum before it, by one kernel each way. Importing this file needs Triton.

PyTorch's takes a block of threads for each row, which is mostly waiting where rows are as short as those of pictures.
Here a program takes several rows at once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from .launch import launch

_NUMBERS = 2048  # of a program's tile; a row is whole within it


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / √(variance + eps) · weight + bias by rows (Ba, Kiros, Hinton 2016, arXiv 1607.06450).

    x: (..., d); float32, float16 or bfloat16 on a CUDA device -> the same. weight, bias: (d,), of any type; frozen:
    they get no gradient. Computed in float32 within.
    """
    return _LayerNorm.apply(x, weight, bias, eps)


def residual_norm(x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y = x + added, or x alone where there is none, and layer_norm of y.

    As a residual block needs both, they come from one kernel, and so does the sum of what comes back from both. added:
    like x. For the rest see layer_norm.
    """
    return _ResidualNorm.apply(x, added, weight, bias, eps)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        x, output, *kept = _normed(x, None, weight, bias, eps)
        ctx.save_for_backward(x, weight, *kept)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _of_input(gradient, None, *ctx.saved_tensors), None, None, None


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        y, output, *kept = _normed(x, added, weight, bias, eps)
        ctx.save_for_backward(y, weight, *kept)
        ctx.set_materialize_grads(False)
        return y, output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, beside: Tensor | None, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        given = beside if gradient is None else _of_input(gradient, beside, *ctx.saved_tensors)
        return given, given if ctx.needs_input_grad[1] else None, None, None, None


def _normed(
    x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is normed and the result; the rows' means and slopes."""
    x = x.contiguous()
    given, y = x if added is None else added.contiguous(), x if added is None else torch.empty_like(x)
    output, (rows, width, grid, tile) = torch.empty_like(x), _sizes(x)
    mean, slope = x.new_empty(2, rows, dtype=torch.float32)
    with torch.cuda.device_of(x):
        launch(
            _forward, grid, x, given, y, weight, bias, output, mean, slope, eps, rows, width, added is not None, *tile
        )
    return y, output, mean, slope


def _of_input(
    gradient: Tensor, beside: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, slope: Tensor
) -> Tensor:
    """The gradient of what was normed; beside: what else comes back to it."""
    gradient, of_input, (rows, width, grid, tile) = gradient.contiguous(), torch.empty_like(x), _sizes(x)
    more = gradient if beside is None else beside.contiguous()
    with torch.cuda.device_of(x):
        launch(
            _backward, grid, x, gradient, more, weight, mean, slope, of_input, rows, width, beside is not None, *tile
        )
    return of_input


def _sizes(x: Tensor) -> tuple[int, int, tuple[int], tuple[int, int]]:
    """Rows and their width; programs; rows and columns of a program."""
    width = x.shape[-1]
    rows, across = x.numel() // width, triton.next_power_of_2(width)
    high = max(1, _NUMBERS // across)
    return rows, width, (triton.cdiv(rows, high),), (high, across)


@triton.jit
def _tile(rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program's rows and columns, where they are in memory, and what is inside."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    return row, column, at, (row < rows)[:, None] & (column < width)[None, :]


@triton.jit(do_not_specialize=["eps", "rows"])
def _forward(  # type: ignore[no-untyped-def]
    x,
    added,
    y,
    weight,
    bias,
    output,
    mean,
    slope,
    eps,
    rows,
    width,
    ADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column, at, inside = _tile(rows, width, ROWS, COLUMNS)
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        values += tl.load(added + at, mask=inside, other=0.0).to(tl.float32)
        short = values.to(y.dtype.element_ty)
        tl.store(y + at, short, mask=inside)
        values = short.to(tl.float32)  # as the way back will read it
    middle = tl.sum(values, 1) / width
    away = tl.where(inside, values - middle[:, None], 0.0)
    steepness = tl.rsqrt(tl.sum(away * away, 1) / width + eps)
    weights = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    biases = tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(output + at, away * steepness[:, None] * weights[None, :] + biases[None, :], mask=inside)
    tl.store(mean + row, middle, mask=row < rows)
    tl.store(slope + row, steepness, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def _backward(  # type: ignore[no-untyped-def]
    x,
    gradient,
    beside,
    weight,
    mean,
    slope,
    of_input,
    rows,
    width,
    BESIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """slope · (gradient - its mean - normed · the mean of their product), of the gradient before weight and bias."""
    row, column, at, inside = _tile(rows, width, ROWS, COLUMNS)
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    arriving = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    weights = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    steepness = tl.load(slope + row, mask=row < rows, other=0.0)[:, None]
    normed = tl.where(inside, (values - tl.load(mean + row, mask=row < rows, other=0.0)[:, None]) * steepness, 0.0)
    arriving *= weights[None, :]
    both = tl.sum(arriving * normed, 1) / width
    arriving -= (tl.sum(arriving, 1) / width)[:, None] + normed * both[:, None]
    arriving *= steepness
    if BESIDE:
        arriving += tl.load(beside + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(of_input + at, arriving, mask=inside)
