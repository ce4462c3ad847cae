"""A LoRA branch's way back in two kernels instead of four and more. Importing this file needs Triton.

The products are thin, so each takes about as long as it takes to start it. Those that need nothing of each other share
a launch here: some programs compute the one, some the other. Sums are float32 and made in a fixed order.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from .launch import launch

# Of a program, in the first kernel and in the second; what it sums up at a time are 128 and 256 rows or columns. Of the
# sizes that were tried on an H100, these were the quickest.
_ROWS, _COLUMNS = 64, 32
_TILE = 128  # sides of a tile of the input's gradient


def through_output(gradient: Tensor, inner: Tensor, up: Tensor, of_up: Tensor, scale: float) -> Tensor:
    """gradient · up (n, rank); adds s · gradientᵀ · inner to of_up.

    gradient: (n, out), inner: (n, rank), up, of_up: (out, rank); float16 or bfloat16, of one type, each row contiguous.
    """
    (rows, outputs), rank = gradient.shape, up.shape[1]
    through = gradient.new_empty(rows, rank)
    first = triton.cdiv(rows, _ROWS)
    with torch.cuda.device_of(gradient):
        launch(
            _through_output, (first + triton.cdiv(outputs, _ROWS),),
            gradient, inner, up, of_up, through, scale, rows, outputs, gradient.stride(0), first,
            rank, _padded(rank), _ROWS, 128,
        )  # fmt: skip
    return through


def through_input(
    of_input: Tensor | None, x: Tensor, through: Tensor, down: Tensor, of_down: Tensor, scale: float
) -> None:
    """Adds s · through · down to of_input, and s · throughᵀ · x to of_down.

    of_input (contiguous; None where it is not wanted), x: (n, in), through: (n, rank), down, of_down: (rank, in).
    """
    (rows, inputs), rank = x.shape, down.shape[0]
    across = triton.cdiv(inputs, _TILE)
    tiles = 0 if of_input is None else triton.cdiv(rows, _TILE) * across
    sums = triton.cdiv(inputs, _COLUMNS)
    with torch.cuda.device_of(x):
        launch(
            _through_input, (sums + tiles,),
            x if of_input is None else of_input, x, through, down, of_down, scale, rows, inputs, x.stride(0), sums,
            across, rank, _padded(rank), _COLUMNS, 256, _TILE,
        )  # fmt: skip


def _padded(rank: int) -> int:
    """The tensor cores take 16 and more."""
    return max(16, triton.next_power_of_2(rank))


@triton.jit
def _block(start, row, column, stride, rows, columns):  # type: ignore[no-untyped-def]
    """Some rows and columns of a matrix, zero outside."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(start + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["scale", "rows", "first"])
def _through_output(  # type: ignore[no-untyped-def]
    gradient, inner, up, of_up, through, scale, rows, outputs, stride, first,
    RANK: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < first:
        _to_ranks(gradient, up, through, rows, outputs, stride, program, RANK, PADDED, WIDE, DEEP)
    else:
        _add_to_up(gradient, inner, of_up, scale, rows, outputs, stride, program - first, RANK, PADDED, WIDE, DEEP)


@triton.jit
def _to_ranks(  # type: ignore[no-untyped-def]
    gradient, up, through, rows, outputs, stride, program,
    RANK: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """Some rows of gradient · up."""
    row, ranks, deep = program * WIDE + tl.arange(0, WIDE), tl.arange(0, PADDED), tl.arange(0, DEEP)
    total = tl.zeros((WIDE, PADDED), tl.float32)
    for begin in range(0, outputs, DEEP):
        arriving = _block(gradient, row, begin + deep, stride, rows, outputs)
        total = tl.dot(arriving, _block(up, begin + deep, ranks, RANK, outputs, RANK), total)
    inside = (row < rows)[:, None] & (ranks < RANK)[None, :]
    tl.store(through + row[:, None] * RANK + ranks[None, :], total, mask=inside)


@triton.jit
def _add_to_up(  # type: ignore[no-untyped-def]
    gradient, inner, of_up, scale, rows, outputs, stride, program,
    RANK: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """Some rows of s · gradientᵀ · inner."""
    column, ranks, deep = program * WIDE + tl.arange(0, WIDE), tl.arange(0, PADDED), tl.arange(0, DEEP)
    total = tl.zeros((WIDE, PADDED), tl.float32)
    for begin in range(0, rows, DEEP):
        arriving = _block(gradient, begin + deep, column, stride, rows, outputs)
        total = tl.dot(tl.trans(arriving), _block(inner, begin + deep, ranks, RANK, rows, RANK), total)
    _add(of_up, column, ranks, RANK, outputs, RANK, scale * total)


@triton.jit
def _add(start, row, column, stride, rows, columns, added):  # type: ignore[no-untyped-def]
    """Adds to some rows and columns of a matrix."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = start + row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0).to(tl.float32) + added, mask=inside)


@triton.jit(do_not_specialize=["scale", "rows", "sums"])
def _through_input(  # type: ignore[no-untyped-def]
    of_input, x, through, down, of_down, scale, rows, inputs, stride, sums, across,
    RANK: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < sums:  # the long ones first
        _add_to_down(x, through, of_down, scale, rows, inputs, stride, program, RANK, PADDED, WIDE, DEEP)
    else:
        _add_to_input(of_input, through, down, scale, rows, inputs, program - sums, across, RANK, PADDED, TILE)


@triton.jit
def _add_to_down(  # type: ignore[no-untyped-def]
    x, through, of_down, scale, rows, inputs, stride, program,
    RANK: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """Some columns of s · throughᵀ · x."""
    column, ranks, deep = program * WIDE + tl.arange(0, WIDE), tl.arange(0, PADDED), tl.arange(0, DEEP)
    total = tl.zeros((PADDED, WIDE), tl.float32)
    for begin in range(0, rows, DEEP):
        narrow = _block(through, begin + deep, ranks, RANK, rows, RANK)
        total = tl.dot(tl.trans(narrow), _block(x, begin + deep, column, stride, rows, inputs), total)
    _add(of_down, ranks, column, inputs, RANK, inputs, scale * total)


@triton.jit
def _add_to_input(  # type: ignore[no-untyped-def]
    of_input, through, down, scale, rows, inputs, tile, across,
    RANK: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile of s · through · down."""
    row, column = tile // across * TILE + tl.arange(0, TILE), tile % across * TILE + tl.arange(0, TILE)
    ranks = tl.arange(0, PADDED)
    narrow = _block(through, row, ranks, RANK, rows, RANK)
    added = tl.dot(narrow, _block(down, ranks, column, inputs, RANK, inputs))
    _add(of_input, row, column, inputs, rows, inputs, scale * added)
