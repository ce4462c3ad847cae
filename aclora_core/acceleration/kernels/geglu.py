"""The gated GELU of transformers in one pass over the memory each way. Importing this file needs Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from .launch import launch

_ROWS, _COLUMNS = 8, 256  # of a tile; a power of two that divides the usual widths


def geglu(hidden: Tensor) -> Tensor:
    """(value, gate) = hidden's halves -> value · GELU(gate), GELU(x) = x · Φ(x) exactly (Hendrycks, Gimpel 2016).

    hidden: (..., 2d) -> (..., d); float32, float16 or bfloat16 on a CUDA device. Computed in float32 within.
    """
    return _Geglu.apply(hidden)


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        hidden = hidden.contiguous()
        width = hidden.shape[-1] // 2
        output = hidden.new_empty(*hidden.shape[:-1], width)
        rows = output.numel() // width
        with torch.cuda.device_of(hidden):
            launch(_forward, _grid(rows, width), hidden, output, rows, width, _ROWS, _COLUMNS)
        ctx.save_for_backward(hidden)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (hidden,) = ctx.saved_tensors
        gradient, of_hidden = gradient.contiguous(), torch.empty_like(hidden)
        width = gradient.shape[-1]
        rows = gradient.numel() // width
        with torch.cuda.device_of(hidden):
            launch(_backward, _grid(rows, width), hidden, gradient, of_hidden, rows, width, _ROWS, _COLUMNS)
        return of_hidden


def _grid(rows: int, width: int) -> tuple[int, int]:
    return triton.cdiv(rows, _ROWS), triton.cdiv(width, _COLUMNS)


@triton.jit
def _tile(rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where a program's part of the output begins, the offsets of its rows and columns from there, what is inside."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    return row.to(tl.int64)[:, None] * width, column[None, :], inside


@triton.jit
def below(gate):  # type: ignore[no-untyped-def]
    """Φ, the share of the normal distribution below the gate."""
    return 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)


@triton.jit(do_not_specialize=["rows"])
def _forward(hidden, output, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column, inside = _tile(rows, width, ROWS, COLUMNS)
    value = tl.load(hidden + 2 * row + column, mask=inside).to(tl.float32)
    gate = tl.load(hidden + 2 * row + width + column, mask=inside).to(tl.float32)
    tl.store(output + row + column, value * gate * below(gate), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward(hidden, gradient, of_hidden, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column, inside = _tile(rows, width, ROWS, COLUMNS)
    value = tl.load(hidden + 2 * row + column, mask=inside).to(tl.float32)
    gate = tl.load(hidden + 2 * row + width + column, mask=inside).to(tl.float32)
    arriving = tl.load(gradient + row + column, mask=inside).to(tl.float32)
    share = below(gate)
    slope = share + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    tl.store(of_hidden + 2 * row + column, arriving * gate * share, mask=inside)
    tl.store(of_hidden + 2 * row + width + column, arriving * value * slope, mask=inside)
