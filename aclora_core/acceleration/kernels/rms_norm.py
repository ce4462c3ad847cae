"""Root mean square normalisation of rows, one kernel forward and one backward.

Queries and keys are normalised by head, in short rows that are parts of longer ones. Here a program takes several rows,
where they are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._strided_rows import as_rows, restore_order, row_counts, row_offset, row_strides, row_tile, stride_order
from ._triton import tl, triton
from .kernel import MAX_ROW_WIDTH, Draw, Kernel
from .launch import launch

_TILE_ELEMENTS = 4096  # of a program's tile, which holds whole rows


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute x · rstd · weight by rows, rstd = 1 / √(mean of x² + eps) (Zhang, Sennrich 2019, arXiv 1910.07467).

    Args:
        x: (..., d) in any layout, float32, float16 or bfloat16. Computed in float32 within.
        weight: (d,) of any dtype; frozen: it gets no gradient.
        eps: added to the mean of squares.

    Returns:
        x's shape and dtype, its axes in memory in the order of x's.
    """
    return _RmsNorm.apply(x, weight, eps)


def supports(x: Tensor) -> bool:
    """Rows that a program can hold."""
    return x.numel() > 0 and x.shape[-1] <= MAX_ROW_WIDTH


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute rms_norm in plain PyTorch, in float32."""
    rstd = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
    return (x.float() * rstd * weight.float()).to(x.dtype)


def examples(draw: Draw) -> Iterator[tuple[Any, ...]]:
    """Heads that lie side by side in memory."""
    yield draw(2, 7, 5, 64).transpose(1, 2).requires_grad_(), draw(64), 1e-5


KERNEL = Kernel("transformer", rms_norm, supports, reference, examples)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        order = stride_order(x)
        rows = as_rows(x, order)
        output = x.new_empty([x.shape[axis] for axis in order] + [x.shape[-1]])
        with torch.cuda.device_of(x):
            launch(
                _forward,
                _grid(rows),
                rows,
                weight,
                output,
                eps,
                *row_counts(rows),
                rows.shape[-1],
                *row_strides(rows),
                *_tile(rows),
            )
        ctx.save_for_backward(x, weight)
        ctx.order, ctx.eps = order, eps
        return restore_order(output, order)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, grad_rows = as_rows(x, ctx.order), as_rows(grad_output, ctx.order)
        grad_input = x.new_empty([x.shape[axis] for axis in ctx.order] + [x.shape[-1]])
        with torch.cuda.device_of(x):
            launch(
                _backward,
                _grid(rows),
                rows,
                grad_rows,
                weight,
                grad_input,
                ctx.eps,
                *row_counts(rows),
                rows.shape[-1],
                *row_strides(rows),
                *row_strides(grad_rows),
                *_tile(rows),
            )
        return restore_order(grad_input, ctx.order), None, None


def _tile(rows: Tensor) -> tuple[int, int]:
    """Rows and columns of a program."""
    columns = triton.next_power_of_2(rows.shape[-1])
    return max(1, _TILE_ELEMENTS // columns), columns


def _grid(rows: Tensor) -> tuple[int]:
    return (triton.cdiv(row_counts(rows)[0], _tile(rows)[0]),)


@triton.jit(do_not_specialize=["eps", "rows", "rows_per_n", "rows_per_m"])
def _forward(  # type: ignore[no-untyped-def]
    x,
    weight,
    output,
    eps,
    rows,
    rows_per_n,
    rows_per_m,
    width,
    stride_n: tl.int64,
    stride_m: tl.int64,
    stride_k: tl.int64,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column, mask = row_tile(rows, width, ROWS, COLUMNS)
    start = row_offset(row, rows_per_n, rows_per_m, stride_n, stride_m, stride_k)[:, None]
    values = tl.load(x + start + column[None, :], mask=mask, other=0.0).to(tl.float32)
    values *= tl.rsqrt(tl.sum(values * values, 1) / width + eps)[:, None]
    values *= tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    tl.store(output + row.to(tl.int64)[:, None] * width + column[None, :], values, mask=mask)


@triton.jit(do_not_specialize=["eps", "rows", "rows_per_n", "rows_per_m"])
def _backward(  # type: ignore[no-untyped-def]
    x,
    grad_output,
    weight,
    grad_input,
    eps,
    rows,
    rows_per_n,
    rows_per_m,
    width,
    stride_n: tl.int64,
    stride_m: tl.int64,
    stride_k: tl.int64,
    grad_stride_n: tl.int64,
    grad_stride_m: tl.int64,
    grad_stride_k: tl.int64,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """rstd · (g - x_hat · mean(g · x_hat)), where x_hat = x · rstd and g = grad_output · weight."""
    row, column, mask = row_tile(rows, width, ROWS, COLUMNS)
    start = row_offset(row, rows_per_n, rows_per_m, stride_n, stride_m, stride_k)[:, None]
    values = tl.load(x + start + column[None, :], mask=mask, other=0.0).to(tl.float32)
    start = row_offset(row, rows_per_n, rows_per_m, grad_stride_n, grad_stride_m, grad_stride_k)[:, None]
    grad = tl.load(grad_output + start + column[None, :], mask=mask, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(values * values, 1) / width + eps)[:, None]
    values *= rstd
    grad *= tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    grad = rstd * (grad - values * (tl.sum(grad * values, 1) / width)[:, None])
    tl.store(grad_input + row.to(tl.int64)[:, None] * width + column[None, :], grad, mask=mask)
