"""Rotary position embedding in one memory pass forward and one backward.

Step by step, PyTorch converts queries and keys to float32 and reads and writes them some ten times in each direction.
A program takes several heads of a token, as the matrices that they share are four times as many bytes as one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._strided_rows import restore_order, row_strides, stride_order
from ._triton import tl, triton
from .kernel import MAX_ROW_WIDTH, Draw, Kernel
from .launch import launch

_TILE_ELEMENTS = 1024  # of a head in a program's tile, which holds whole rows
_MAX_HEADS = 8  # in a tile
_WARPS = 4


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
    order, width = stride_order(x), x.shape[-1]
    output = restore_order(x.new_empty([*(x.shape[axis] for axis in order), width]), order)
    axes = _axes(x, table)
    rows, matrices, rotated = (it.permute(*axes, 3) for it in (x, table, output))
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    n, tokens, heads = rows.shape[:3]
    tile = _tile(width, heads if matrices.shape[2] == 1 else 1)
    with torch.cuda.device_of(x):
        launch(
            _rope,
            (triton.cdiv(tokens, tile[0]), triton.cdiv(heads, tile[1]), n),
            rows,
            matrices,
            rotated,
            tokens,
            heads,
            width,
            *row_strides(rows),
            *row_strides(matrices),
            *row_strides(rotated),
            transposed,
            *tile,
            num_warps=_WARPS,
        )
    return output


def _axes(x: Tensor, table: Tensor) -> tuple[int, int, int]:
    """The axes of x as (n, tokens, heads), where all heads share the matrices of a token if the table allows it."""
    shared = [axis for axis in range(3) if table.shape[axis] == 1]
    heads = max(shared, key=lambda axis: x.shape[axis]) if shared else min(range(3), key=lambda axis: x.shape[axis])
    n, tokens = sorted({0, 1, 2} - {heads}, key=lambda axis: x.shape[axis])
    return n, tokens, heads


def _tile(width: int, heads: int) -> tuple[int, int, int]:
    """Tokens, heads and columns of a program."""
    columns = triton.next_power_of_2(width)
    tokens = max(1, _TILE_ELEMENTS // columns)
    most = max(1, _TILE_ELEMENTS * _MAX_HEADS // (tokens * columns))
    return tokens, min(triton.next_power_of_2(heads), most), columns


@triton.jit(do_not_specialize=["tokens", "heads"])
def _rope(  # type: ignore[no-untyped-def]
    x,
    table,
    output,
    tokens,
    heads,
    width,
    stride_n: tl.int64,
    stride_token: tl.int64,
    stride_head: tl.int64,
    table_stride_n: tl.int64,
    table_stride_token: tl.int64,
    table_stride_head: tl.int64,
    output_stride_n: tl.int64,
    output_stride_token: tl.int64,
    output_stride_head: tl.int64,
    TRANSPOSED: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # Threads are spread over columns and tokens, so each keeps its matrices for all heads of the tile. The matrices are
    # loaded first: Triton computes in the layout of the last load, and moves what was loaded before to it.
    n, first_head = tl.program_id(2), tl.program_id(1) * HEADS
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None, None]
    entry = tl.arange(0, 2 * COLUMNS)[None, None, :]
    start = table + n * table_stride_n + token * table_stride_token + first_head * table_stride_head
    matrices = tl.load(start + entry, mask=(token < tokens) & (entry < 2 * width), other=0.0)

    head = first_head + tl.arange(0, HEADS)[None, :, None]
    column = tl.arange(0, COLUMNS)[None, None, :]
    mask = (token < tokens) & (head < heads) & (column < width)
    start = x + n * stride_n + token * stride_token + head * stride_head
    values = tl.load(start + column, mask=mask, other=0.0).to(tl.float32)

    left, right = tl.split(tl.reshape(matrices, (TOKENS, 1, COLUMNS // 2, 2, 2)))  # columns of each matrix
    m00, m10 = tl.split(left)
    m01, m11 = tl.split(right)
    x0, x1 = tl.split(tl.reshape(values, (TOKENS, HEADS, COLUMNS // 2, 2)))
    if TRANSPOSED:
        rotated = tl.join(m00 * x0 + m10 * x1, m01 * x0 + m11 * x1)
    else:
        rotated = tl.join(m00 * x0 + m01 * x1, m10 * x0 + m11 * x1)
    start = output + n * output_stride_n + token * output_stride_token + head * output_stride_head
    tl.store(start + column, tl.reshape(rotated, (TOKENS, HEADS, COLUMNS)), mask=mask)
