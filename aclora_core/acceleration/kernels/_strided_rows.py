"""Rows of a tensor that lie apart in memory, so that they can be read where they are. Importing this file needs Triton.

Heads of an attention are parts of wider rows, and PyTorch copies them together before it computes with them.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor


def order_of(x: Tensor) -> tuple[int, ...]:
    """The axes of x but the last, those first whose steps are the widest."""
    return tuple(sorted(range(x.dim() - 1), key=x.stride, reverse=True))


def rows_of(x: Tensor, order: Sequence[int]) -> Tensor:
    """x with its axes in another order, as (n, m, k, d); the same memory, if its last axis lies side by side there."""
    x = x.permute(*order, x.dim() - 1)
    if x.stride(-1) != 1:
        x = x.contiguous()
    if x.dim() > 4:
        x = x.reshape(-1, *x.shape[-3:])
    return x[(None,) * (4 - x.dim())]


def put_back(x: Tensor, order: Sequence[int]) -> Tensor:
    """Undoes the order of axes."""
    return x.permute(*(order.index(axis) for axis in range(len(order))), len(order))


def steps(x: Tensor) -> list[int]:
    """How far rows are apart along the first three of four axes; 0 where there is one only, or the same again."""
    return [stride if size > 1 else 0 for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True)]


def counts(x: Tensor) -> tuple[int, int, int]:
    """All rows of (n, m, k, d), those of one along n, and along m."""
    return x.shape[0] * x.shape[1] * x.shape[2], x.shape[1] * x.shape[2], x.shape[2]


@triton.jit
def tile(rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program's rows, which it has whole, and their columns; and what is inside."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    return row, column, (row < rows)[:, None] & (column < width)[None, :]


@triton.jit
def begins(row, many, few, first, second, third):  # type: ignore[no-untyped-def]
    """Where rows begin: of (n, m, k) there are many = m · k along n and few = k along m, so many numbers apart."""
    return (row // many).to(tl.int64) * first + (row % many // few) * second + (row % few) * third
