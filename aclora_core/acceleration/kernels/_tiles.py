"""Tiles of matrices, and sums over their rows that several programs share (split-K).

A program that sums over thousands of rows mostly waits. Long sums are therefore split: each program leaves its partial
sum in memory, and the last one to arrive adds them all, in a fixed order.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import tl, triton

_MIN_SPLIT_ROWS = 2048  # sums over fewer rows are not split
_TARGET_PROGRAMS = 264  # programs that all sums together are split into
_MIN_ROWS_PER_SPLIT = 512
_MAX_SUMS = 256  # sums that may be split in one launch


class SplitK(NamedTuple):
    """How long sums are split among programs. The order is that of the kernels' parameters."""

    scratch: Tensor  # room for the partial sums, float32
    arrived: Tensor  # number of partial sums that are done, for each sum; 0 between launches
    splits: int
    rows_per_split: int


def plan_split_k(rows: int, sums: int, block_k: int, size: int, device: torch.device) -> SplitK:
    """Plan how sums over rows are split.

    Args:
        rows: the length of the sums.
        sums: the number of tiles that are summed in one launch.
        block_k: the number of rows a program takes in one step.
        size: the number of elements of a tile.
        device: where the sums are computed.
    """
    is_long = rows >= _MIN_SPLIT_ROWS and sums <= _MAX_SUMS
    splits = max(1, min(_TARGET_PROGRAMS // sums, rows // _MIN_ROWS_PER_SPLIT)) if is_long else 1
    rows_per_split = triton.cdiv(triton.cdiv(rows, splits), block_k) * block_k
    splits = triton.cdiv(rows, rows_per_split)
    arrived = _arrived(device)  # also without a split, as it must not be allocated during a capture
    scratch = arrived if splits == 1 else torch.empty(sums * splits * size, device=device)
    return SplitK(scratch.view(torch.float32), arrived, splits, rows_per_split)


@functools.lru_cache
def _arrived(device: torch.device) -> Tensor:
    return torch.zeros(_MAX_SUMS, dtype=torch.int32, device=device)


def padded_rank(rank: int) -> int:
    """Round a rank up to what tensor cores take: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(rank))


@triton.jit
def load_block(start, row, column, stride, rows, columns):  # type: ignore[no-untyped-def]
    """Load a block of a matrix, zero outside it."""
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(start + row.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_block(start, row, column, stride, rows, columns, value):  # type: ignore[no-untyped-def]
    """Store a block of a matrix, except what lies outside it."""
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(start + row.to(tl.int64)[:, None] * stride + column[None, :], value, mask=mask)


@triton.jit
def add_block(start, row, column, stride, rows, columns, added):  # type: ignore[no-untyped-def]
    """Add to a block of a matrix."""
    previous = load_block(start, row, column, stride, rows, columns)
    store_block(start, row, column, stride, rows, columns, previous.to(tl.float32) + added)


@triton.jit
def accumulate_outer(  # type: ignore[no-untyped-def]
    wide,
    narrow,
    begin,
    end,
    columns,
    stride,
    index,
    RANK: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute block number `index` of wideᵀ · narrow, (BLOCK_N, rank), over the rows from begin to end.

    wide: (rows, columns); narrow: (rows, rank).
    """
    column, ranks, k = index * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, PADDED_RANK), tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_N, PADDED_RANK), tl.float32)
    for first in range(begin, end, BLOCK_K):
        values = load_block(wide, first + k, column, stride, end, columns)
        total = tl.dot(tl.trans(values), load_block(narrow, first + k, ranks, RANK, end, RANK), total)
    return total


@triton.jit
def split_k_reduce(  # type: ignore[no-untyped-def]
    total, scratch, arrived, index, split, splits, BLOCK_N: tl.constexpr, PADDED_RANK: tl.constexpr
):
    """Split-K reduction: the last program adds all partial sums in a fixed order. Returns (is_last, total).

    total: the program's partial sum number `split` of sum number `index`.
    """
    is_last = splits == 1
    if splits > 1:
        first = index * splits * (BLOCK_N * PADDED_RANK)
        offset = first + tl.arange(0, BLOCK_N)[:, None] * PADDED_RANK + tl.arange(0, PADDED_RANK)[None, :]
        tl.store(scratch + split * (BLOCK_N * PADDED_RANK) + offset, total)
        tl.debug_barrier()
        is_last = tl.atomic_add(arrived + index, 1) == splits - 1
        if is_last:
            total = tl.zeros((BLOCK_N, PADDED_RANK), tl.float32)
            for each in range(0, splits):
                # Not from the cache, as other programs have written it.
                total += tl.load(scratch + each * (BLOCK_N * PADDED_RANK) + offset, cache_modifier=".cg")
            tl.store(arrived + index, 0)
    return is_last, total
