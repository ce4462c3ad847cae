"""What kernels of matrices share: blocks of them, and sums over their rows. Importing this file needs Triton.

A program that sums up thousands of rows is mostly waiting. So long sums are shared out: each program leaves its part in
memory, and the last to arrive joins them, in a fixed order.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

# Sums over so many rows are shared out, by so many programs, each of so many rows at least; so many sums at a time.
_LONG, _PROGRAMS, _SHORTEST, _MOST_SUMS = 2048, 264, 512, 256


class Shares(NamedTuple):
    """How long sums are shared out to several programs each."""

    scratch: Tensor  # room for what the parts come to, float32
    arrived: Tensor  # how many parts of each sum are done; 0 between two launches
    parts: int
    each: int  # rows of a part


def share_out(rows: int, sums: int, step: int, size: int, device: torch.device) -> Shares:
    """Shares for so many sums of so many numbers over so many rows, of which a program takes some at a step."""
    long = rows >= _LONG and sums <= _MOST_SUMS
    parts = max(1, min(_PROGRAMS // sums, rows // _SHORTEST)) if long else 1
    each = triton.cdiv(triton.cdiv(rows, parts), step) * step
    parts = triton.cdiv(rows, each)
    arrived = _arrived(device)  # also where there is one part, as it must not be made in a recording
    scratch = arrived if parts == 1 else torch.empty(sums * parts * size, device=device)
    return Shares(scratch.view(torch.float32), arrived, parts, each)


@functools.lru_cache
def _arrived(device: torch.device) -> Tensor:
    return torch.zeros(_MOST_SUMS, dtype=torch.int32, device=device)


def padded(rank: int) -> int:
    """The tensor cores take 16 and more."""
    return max(16, triton.next_power_of_2(rank))


@triton.jit
def block(start, row, column, stride, rows, columns):  # type: ignore[no-untyped-def]
    """Some rows and columns of a matrix, zero outside."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(start + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def store(start, row, column, stride, rows, columns, value):  # type: ignore[no-untyped-def]
    """Stores some rows and columns of a matrix, but for what lies outside."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(start + row.to(tl.int64)[:, None] * stride + column[None, :], value, mask=inside)


@triton.jit
def add(start, row, column, stride, rows, columns, added):  # type: ignore[no-untyped-def]
    """Adds to some rows and columns of a matrix."""
    before = block(start, row, column, stride, rows, columns)
    store(start, row, column, stride, rows, columns, before.to(tl.float32) + added)


@triton.jit
def summed(  # type: ignore[no-untyped-def]
    wide,
    narrow,
    begin,
    end,
    columns,
    stride,
    place,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    WIDE: tl.constexpr,
    DEEP: tl.constexpr,
):
    """Some rows of wideᵀ · narrow, for the rows from begin to end of wide (rows, columns) and narrow (rows, rank)."""
    column, ranks, deep = place * WIDE + tl.arange(0, WIDE), tl.arange(0, PADDED), tl.arange(0, DEEP)
    total = tl.zeros((WIDE, PADDED), tl.float32)
    for first in range(begin, end, DEEP):
        values = block(wide, first + deep, column, stride, end, columns)
        total = tl.dot(tl.trans(values), block(narrow, first + deep, ranks, RANK, end, RANK), total)
    return total


@triton.jit
def joined(total, scratch, arrived, number, part, parts, WIDE: tl.constexpr, PADDED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether a program is the last of those that share a sum, and for it what all of them come to, in their order."""
    last = parts == 1
    if parts > 1:
        at = number * parts * (WIDE * PADDED) + tl.arange(0, WIDE)[:, None] * PADDED + tl.arange(0, PADDED)[None, :]
        tl.store(scratch + part * (WIDE * PADDED) + at, total)
        tl.debug_barrier()
        last = tl.atomic_add(arrived + number, 1) == parts - 1
        if last:
            total = tl.zeros((WIDE, PADDED), tl.float32)
            for each in range(0, parts):
                total += tl.load(scratch + each * (WIDE * PADDED) + at, cache_modifier=".cg")  # others have written it
            tl.store(arrived + number, 0)
    return last, total
