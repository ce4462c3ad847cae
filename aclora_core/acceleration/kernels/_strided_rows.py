"""Rows with arbitrary strides, read where they are in memory.

The heads of an attention are parts of wider rows, which PyTorch copies together before it computes with them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._triton import tl, triton


def stride_order(x: Tensor) -> tuple[int, ...]:
    """The axes of x except the last, sorted by falling stride."""
    return tuple(sorted(range(x.dim() - 1), key=x.stride, reverse=True))


def as_rows(x: Tensor, order: Sequence[int]) -> Tensor:
    """Permute x to an order of axes, as (n, m, k, d); without a copy if its last axis is contiguous."""
    x = x.permute(*order, x.dim() - 1)
    if x.stride(-1) != 1:
        x = x.contiguous()
    if x.dim() > 4:
        x = x.reshape(-1, *x.shape[-3:])
    return x[(None,) * (4 - x.dim())]


def restore_order(x: Tensor, order: Sequence[int]) -> Tensor:
    """Undo the permutation of as_rows."""
    return x.permute(*(order.index(axis) for axis in range(len(order))), len(order))


def row_strides(x: Tensor) -> list[int]:
    """Strides of the first three axes of (n, m, k, d); 0 for an axis of size 1 or an expanded one."""
    return [stride if size > 1 else 0 for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True)]


def row_counts(x: Tensor) -> tuple[int, int, int]:
    """Of (n, m, k, d): the number of rows, those of each n (m · k), and those of each m (k)."""
    return x.shape[0] * x.shape[1] * x.shape[2], x.shape[1] * x.shape[2], x.shape[2]


@triton.jit
def row_tile(rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program's rows, all columns of them, and the mask of what lies within the tensor."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    return row, column, (row < rows)[:, None] & (column < width)[None, :]


@triton.jit
def row_offset(row, rows_per_n, rows_per_m, stride_n, stride_m, stride_k):  # type: ignore[no-untyped-def]
    """Offset of each row of an (n, m, k, d) tensor from its flat index and strides."""
    n_offset = (row // rows_per_n).to(tl.int64) * stride_n
    return n_offset + (row % rows_per_n // rows_per_m) * stride_m + (row % rows_per_m) * stride_k
