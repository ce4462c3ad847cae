"""Rotary position embedding in one pass over the memory each way. Importing this file needs Triton.

In PyTorch's steps the queries and keys become float32 and are read and written some ten times each way.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from ._strided_rows import begins, counts, order_of, put_back, rows_of, steps, tile
from .launch import launch

_NUMBERS = 2048  # of a program's tile; a row is whole within it


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Multiplies each pair of neighbours in a row by its matrix: a rotation by position (Su et al. 2021, arXiv
    2104.09864, section 3.2).

    x: (a, b, c, d), in any layout; float32, float16 or bfloat16 on a CUDA device -> the same, its axes in the order of
    x's. table: (a, b, c, d / 2, 2, 2), each of a, b, c may be 1 for all; float32; it gets no gradient.
    """
    return _Rotation.apply(x, table)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        table = table.flatten(3).contiguous()
        ctx.save_for_backward(table)
        return _rotated(x, table, False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (table,) = ctx.saved_tensors
        return _rotated(gradient, table, True), None


def _rotated(x: Tensor, table: Tensor, back: bool) -> Tensor:
    """table: (a, b, c, 2d). back: by the transposed matrices, which rotate the other way."""
    order = order_of(x)
    rows, angles = rows_of(x, order), table.permute(*order, 3)
    output, width = torch.empty(rows.shape, dtype=x.dtype, device=x.device), rows.shape[-1]
    across = triton.next_power_of_2(width)
    high = max(1, _NUMBERS // across)
    with torch.cuda.device_of(x):
        launch(
            _rotate,
            (triton.cdiv(counts(rows)[0], high),),
            rows,
            angles,
            output,
            *counts(rows),
            width,
            *steps(rows),
            *steps(angles),
            back,
            high,
            across,
        )
    return put_back(output, order)


@triton.jit(do_not_specialize=["rows", "many", "few"])
def _rotate(  # type: ignore[no-untyped-def]
    x,
    table,
    output,
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
    BACK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column, inside = tile(rows, width, ROWS, COLUMNS)
    start = begins(row, many, few, first, second, third)[:, None]
    values = tl.load(x + start + column[None, :], mask=inside, other=0.0).to(tl.float32)
    numbers = tl.arange(0, 2 * COLUMNS)
    known = (row < rows)[:, None] & (numbers < 2 * width)[None, :]
    start = begins(row, many, few, first_2, second_2, third_2)[:, None]
    matrices = tl.load(table + start + numbers[None, :], mask=known, other=0.0)
    one, other = tl.split(tl.reshape(values, (ROWS, COLUMNS // 2, 2)))
    left, right = tl.split(tl.reshape(matrices, (ROWS, COLUMNS // 2, 2, 2)))  # columns of each matrix
    of_one, below = tl.split(left)
    beside, of_other = tl.split(right)
    if BACK:
        turned = tl.join(of_one * one + below * other, beside * one + of_other * other)
    else:
        turned = tl.join(of_one * one + beside * other, below * one + of_other * other)
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(output + at, tl.reshape(turned, (ROWS, COLUMNS)), mask=inside)
