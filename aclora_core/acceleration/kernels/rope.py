"""Rotary position embedding in one memory pass forward and one backward.

Step by step, PyTorch converts queries and keys to float32 and reads and writes them some ten times in each direction.
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

_TILE_ELEMENTS = 2048  # of a program's tile, which holds whole rows


def rope(x: Tensor, table: Tensor) -> Tensor:
    """Multiply each pair of neighbours in a row by its rotation matrix (Su et al. 2021, arXiv 2104.09864, 3.2).

    Args:
        x: (a, b, c, d) in any layout, float32, float16 or bfloat16.
        table: (a, b, c, d / 2, 2, 2), float32, where each of a, b, c may be 1; gets no gradient.

    Returns:
        x's shape and dtype, its axes in memory in the order of x's.
    """
    return _Rope.apply(x, table)


def supports(x: Tensor, table: Tensor) -> bool:
    """Four axes, rows that a program can hold, and a constant table that broadcasts to x."""
    if not (x.dim() == 4 and 0 < x.shape[-1] <= MAX_ROW_WIDTH and x.numel() > 0):
        return False
    if table.dim() != 6 or table.dtype != torch.float32 or table.device != x.device or table.requires_grad:
        return False
    broadcasts = all(size in (1, wanted) for size, wanted in zip(table.shape[:3], x.shape[:3], strict=True))
    return broadcasts and x.shape[-1] % 2 == 0 and table.shape[3:] == (x.shape[-1] // 2, 2, 2)


def reference(x: Tensor, table: Tensor) -> Tensor:
    """Compute rope in plain PyTorch, in the table's dtype."""
    pairs = x.unflatten(-1, (-1, 1, 2))
    return (pairs * table).sum(-1).flatten(-2).to(x.dtype)


def examples(draw: Draw) -> Iterator[tuple[Any, ...]]:
    """Heads that lie side by side in memory, with one table for all."""
    yield draw(2, 7, 5, 64).transpose(1, 2).requires_grad_(), draw(1, 1, 7, 32, 2, 2).float()


KERNEL = Kernel("transformer", rope, supports, reference, examples)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        table = table.flatten(3).contiguous()
        ctx.save_for_backward(table)
        return _rotate(x, table, False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (table,) = ctx.saved_tensors
        return _rotate(grad_output, table, True), None


def _rotate(x: Tensor, table: Tensor, transposed: bool) -> Tensor:
    """Multiply by the matrices of a table (a, b, c, 2d), or by the transposed ones, which rotate back."""
    order = stride_order(x)
    rows, matrices = as_rows(x, order), table.permute(*order, 3)
    output, width = torch.empty(rows.shape, dtype=x.dtype, device=x.device), rows.shape[-1]
    tile_columns = triton.next_power_of_2(width)
    tile_rows = max(1, _TILE_ELEMENTS // tile_columns)
    with torch.cuda.device_of(x):
        launch(
            _rope,
            (triton.cdiv(row_counts(rows)[0], tile_rows),),
            rows,
            matrices,
            output,
            *row_counts(rows),
            width,
            *row_strides(rows),
            *row_strides(matrices),
            transposed,
            tile_rows,
            tile_columns,
        )
    return restore_order(output, order)


@triton.jit(do_not_specialize=["rows", "rows_per_n", "rows_per_m"])
def _rope(  # type: ignore[no-untyped-def]
    x,
    table,
    output,
    rows,
    rows_per_n,
    rows_per_m,
    width,
    stride_n: tl.int64,
    stride_m: tl.int64,
    stride_k: tl.int64,
    table_stride_n: tl.int64,
    table_stride_m: tl.int64,
    table_stride_k: tl.int64,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column, mask = row_tile(rows, width, ROWS, COLUMNS)
    start = row_offset(row, rows_per_n, rows_per_m, stride_n, stride_m, stride_k)[:, None]
    values = tl.load(x + start + column[None, :], mask=mask, other=0.0).to(tl.float32)
    entry = tl.arange(0, 2 * COLUMNS)
    table_mask = (row < rows)[:, None] & (entry < 2 * width)[None, :]
    start = row_offset(row, rows_per_n, rows_per_m, table_stride_n, table_stride_m, table_stride_k)[:, None]
    matrices = tl.load(table + start + entry[None, :], mask=table_mask, other=0.0)
    x0, x1 = tl.split(tl.reshape(values, (ROWS, COLUMNS // 2, 2)))
    left, right = tl.split(tl.reshape(matrices, (ROWS, COLUMNS // 2, 2, 2)))  # columns of each matrix
    m00, m10 = tl.split(left)
    m01, m11 = tl.split(right)
    if TRANSPOSED:
        rotated = tl.join(m00 * x0 + m10 * x1, m01 * x0 + m11 * x1)
    else:
        rotated = tl.join(m00 * x0 + m01 * x1, m10 * x0 + m11 * x1)
    offset = row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(output + offset, tl.reshape(rotated, (ROWS, COLUMNS)), mask=mask)
