"""Layer normalisation, one kernel forward and one backward.

PyTorch's kernel takes a block of threads for each row, which mostly waits where rows are as short as those of images.
Here a program takes several rows at once. residual_norm.py shares these kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import tl, triton
from .kernel import MAX_ROW_WIDTH, Draw, Kernel
from .launch import launch

_TILE_ELEMENTS = 2048  # of a program's tile, which holds whole rows


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Compute (x - mean) · rstd · weight + bias by rows (Ba, Kiros, Hinton 2016, arXiv 1607.06450).

    Args:
        x: (..., d), float32, float16 or bfloat16. Computed in float32 within.
        weight: (d,) of any dtype; frozen: it gets no gradient.
        bias: like weight.
        eps: added to the variance.

    Returns:
        x's shape and dtype.
    """
    return _LayerNorm.apply(x, weight, bias, eps)


def supports(x: Tensor) -> bool:
    """Rows that a program can hold."""
    return x.numel() > 0 and x.shape[-1] <= MAX_ROW_WIDTH


def reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Compute layer_norm in plain PyTorch."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def examples(draw: Draw) -> Iterator[tuple[Any, ...]]:
    """Rows of a width that does not fill its tile."""
    yield draw(70, 320).requires_grad_(), draw(320), draw(320), 1e-5


KERNEL = Kernel("unet", layer_norm, supports, reference, examples)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        x, output, mean, rstd = norm_forward(x, None, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return norm_backward(grad_output, None, *ctx.saved_tensors), None, None, None


def norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise y = x + residual, or x.

    Returns:
        y; the result; mean and rstd of the rows of y, float32.
    """
    x = x.contiguous()
    if residual is None:
        added, y = x, x
    else:
        added, y = residual.contiguous(), torch.empty_like(x)
    output, (rows, width, grid, tile) = torch.empty_like(x), _sizes(x)
    mean, rstd = x.new_empty(2, rows, dtype=torch.float32)
    with torch.cuda.device_of(x):
        launch(
            _forward, grid, x, added, y, weight, bias, output, mean, rstd, eps, rows, width, residual is not None, *tile
        )
    return y, output, mean, rstd


def norm_backward(
    grad_output: Tensor, grad_y: Tensor | None, y: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> Tensor:
    """Compute the gradient of y from that of the normalised y, plus grad_y if given."""
    grad_output, grad_input, (rows, width, grid, tile) = grad_output.contiguous(), torch.empty_like(y), _sizes(y)
    added = grad_output if grad_y is None else grad_y.contiguous()
    with torch.cuda.device_of(y):
        launch(
            _backward,
            grid,
            y,
            grad_output,
            added,
            weight,
            mean,
            rstd,
            grad_input,
            rows,
            width,
            grad_y is not None,
            *tile,
        )
    return grad_input


def _sizes(x: Tensor) -> tuple[int, int, tuple[int], tuple[int, int]]:
    """Number of rows and their width; the grid; rows and columns of a tile."""
    width = x.shape[-1]
    rows, tile_columns = x.numel() // width, triton.next_power_of_2(width)
    tile_rows = max(1, _TILE_ELEMENTS // tile_columns)
    return rows, width, (triton.cdiv(rows, tile_rows),), (tile_rows, tile_columns)


@triton.jit
def _tile(rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program's rows and columns, their offsets, and the mask of what lies within the tensor."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    offset = row.to(tl.int64)[:, None] * width + column[None, :]
    return row, column, offset, (row < rows)[:, None] & (column < width)[None, :]


@triton.jit(do_not_specialize=["eps", "rows"])
def _forward(  # type: ignore[no-untyped-def]
    x,
    residual,
    y,
    weight,
    bias,
    output,
    means,
    rstds,
    eps,
    rows,
    width,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column, offset, mask = _tile(rows, width, ROWS, COLUMNS)
    values = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        values += tl.load(residual + offset, mask=mask, other=0.0).to(tl.float32)
        rounded = values.to(y.dtype.element_ty)
        tl.store(y + offset, rounded, mask=mask)
        values = rounded.to(tl.float32)  # as the backward pass will read it
    mean = tl.sum(values, 1) / width
    centered = tl.where(mask, values - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, 1) / width + eps)
    weights = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    biases = tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(output + offset, centered * rstd[:, None] * weights[None, :] + biases[None, :], mask=mask)
    tl.store(means + row, mean, mask=row < rows)
    tl.store(rstds + row, rstd, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def _backward(  # type: ignore[no-untyped-def]
    y,
    grad_output,
    grad_y,
    weight,
    means,
    rstds,
    grad_input,
    rows,
    width,
    GRAD_Y: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """rstd · (g - mean(g) - y_hat · mean(g · y_hat)), where y_hat = (y - mean) · rstd and g = grad_output · weight."""
    row, column, offset, mask = _tile(rows, width, ROWS, COLUMNS)
    values = tl.load(y + offset, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_output + offset, mask=mask, other=0.0).to(tl.float32)
    weights = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    rstd = tl.load(rstds + row, mask=row < rows, other=0.0)[:, None]
    y_hat = tl.where(mask, (values - tl.load(means + row, mask=row < rows, other=0.0)[:, None]) * rstd, 0.0)
    grad *= weights[None, :]
    projection = tl.sum(grad * y_hat, 1) / width
    grad -= (tl.sum(grad, 1) / width)[:, None] + y_hat * projection[:, None]
    grad *= rstd
    if GRAD_Y:
        grad += tl.load(grad_y + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_input + offset, grad, mask=mask)
