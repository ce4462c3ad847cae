"""Normalisation of rows by their root mean square, one kernel each way. Importing this file needs Triton.

Queries and keys are normed by head, in short rows that are parts of longer ones: here a program takes several, where
they are.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from ._strided_rows import begins, counts, order_of, put_back, rows_of, steps, tile
from .launch import launch

_NUMBERS = 4096  # of a program's tile; a row is whole within it


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean of x² + eps) · weight by rows (Zhang, Sennrich 2019, arXiv 1910.07467).

    x: (..., d), in any layout; float32, float16 or bfloat16 on a CUDA device -> the same, its axes in the order of x's.
    weight: (d,), of any type; frozen: it gets no gradient. Computed in float32 within.
    """
    return _RmsNorm.apply(x, weight, eps)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        order = order_of(x)
        rows = rows_of(x, order)
        output = x.new_empty([x.shape[axis] for axis in order] + [x.shape[-1]])
        with torch.cuda.device_of(x):
            launch(
                _forward,
                _grid(rows),
                rows,
                weight,
                output,
                eps,
                *counts(rows),
                rows.shape[-1],
                *steps(rows),
                *_tile(rows),
            )
        ctx.save_for_backward(x, weight)
        ctx.order, ctx.eps = order, eps
        return put_back(output, order)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, arriving = rows_of(x, ctx.order), rows_of(gradient, ctx.order)
        of_input = x.new_empty([x.shape[axis] for axis in ctx.order] + [x.shape[-1]])
        with torch.cuda.device_of(x):
            launch(
                _backward,
                _grid(rows),
                rows,
                arriving,
                weight,
                of_input,
                ctx.eps,
                *counts(rows),
                rows.shape[-1],
                *steps(rows),
                *steps(arriving),
                *_tile(rows),
            )
        return put_back(of_input, ctx.order), None, None


def _tile(rows: Tensor) -> tuple[int, int]:
    across = triton.next_power_of_2(rows.shape[-1])
    return max(1, _NUMBERS // across), across


def _grid(rows: Tensor) -> tuple[int]:
    return (triton.cdiv(counts(rows)[0], _tile(rows)[0]),)


@triton.jit(do_not_specialize=["eps", "rows", "many", "few"])
def _forward(  # type: ignore[no-untyped-def]
    x,
    weight,
    output,
    eps,
    rows,
    many,
    few,
    width,
    first: tl.int64,
    second: tl.int64,
    third: tl.int64,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column, inside = tile(rows, width, ROWS, COLUMNS)
    start = begins(row, many, few, first, second, third)[:, None]
    values = tl.load(x + start + column[None, :], mask=inside, other=0.0).to(tl.float32)
    values *= tl.rsqrt(tl.sum(values * values, 1) / width + eps)[:, None]
    values *= tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    tl.store(output + row.to(tl.int64)[:, None] * width + column[None, :], values, mask=inside)


@triton.jit(do_not_specialize=["eps", "rows", "many", "few"])
def _backward(  # type: ignore[no-untyped-def]
    x,
    gradient,
    weight,
    of_input,
    eps,
    rows,
    many,
    few,
    width,
    first: tl.int64,
    second: tl.int64,
    third: tl.int64,
    first_2: tl.int64,
    second_2: tl.int64,
    third_2: tl.int64,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """slope · (gradient - normed · the mean of their product), of the gradient before the weight."""
    row, column, inside = tile(rows, width, ROWS, COLUMNS)
    start = begins(row, many, few, first, second, third)[:, None]
    values = tl.load(x + start + column[None, :], mask=inside, other=0.0).to(tl.float32)
    start = begins(row, many, few, first_2, second_2, third_2)[:, None]
    arriving = tl.load(gradient + start + column[None, :], mask=inside, other=0.0).to(tl.float32)
    slope = tl.rsqrt(tl.sum(values * values, 1) / width + eps)[:, None]
    values *= slope
    arriving *= tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    arriving = slope * (arriving - values * (tl.sum(arriving * values, 1) / width)[:, None])
    tl.store(of_input + row.to(tl.int64)[:, None] * width + column[None, :], arriving, mask=inside)
