"""GELU of rows that lie apart in memory, one kernel each way. Importing this file needs Triton.

What a layer gives may be several things side by side. PyTorch takes four times as long for one of them as for a tensor
of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from .geglu import below
from .launch import launch

_ROWS, _COLUMNS = 4, 512  # of a tile


def gelu(x: Tensor, tanh: bool) -> Tensor:
    """x · Φ(x), exactly or by a hyperbolic tangent (Hendrycks, Gimpel 2016, arXiv 1606.08415, section 2).

    x: (..., d), in any layout; float32, float16 or bfloat16 on a CUDA device -> the same,
    contiguous. Computed in float32 within.
    """
    return _Gelu.apply(x, tanh)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tanh: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.tanh = tanh
        rows, output = _rows(x), x.new_empty(x.shape)
        with torch.cuda.device_of(x):
            launch(_forward, _grid(rows), rows, output, *rows.shape, rows.stride(0), tanh, _ROWS, _COLUMNS)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        rows, arriving, of_x = _rows(x), _rows(gradient), x.new_empty(x.shape)
        apart = rows.stride(0), arriving.stride(0)
        with torch.cuda.device_of(x):
            launch(_backward, _grid(rows), rows, arriving, of_x, *rows.shape, *apart, ctx.tanh, _ROWS, _COLUMNS)
        return of_x, None


def _rows(x: Tensor) -> Tensor:
    """(rows, d): the same memory, if its last axis lies side by side there and the others are evenly apart."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _grid(rows: Tensor) -> tuple[int, int]:
    return triton.cdiv(rows.shape[0], _ROWS), triton.cdiv(rows.shape[1], _COLUMNS)


@triton.jit
def _tile(rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program's rows and columns, and what is inside."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    return row.to(tl.int64), column, (row < rows) & (column < width)


@triton.jit
def _share(x, TANH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Φ(x), or what stands for it, and its slope."""
    if TANH:  # (1 + tanh u) / 2 is the logistic function of 2u
        steep = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        share = tl.sigmoid(tl.minimum(tl.maximum(steep, -80.0), 80.0))
        slope = share * (1 - share) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    else:
        share = below(x)
        slope = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return share, slope


@triton.jit(do_not_specialize=["rows"])
def _forward(  # type: ignore[no-untyped-def]
    x, output, rows, width, apart: tl.int64, TANH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row, column, inside = _tile(rows, width, ROWS, COLUMNS)
    values = tl.load(x + row * apart + column, mask=inside, other=0.0).to(tl.float32)
    share, _ = _share(values, TANH)
    tl.store(output + row * width + column, values * share, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward(  # type: ignore[no-untyped-def]
    x,
    gradient,
    of_x,
    rows,
    width,
    apart: tl.int64,
    apart_2: tl.int64,
    TANH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column, inside = _tile(rows, width, ROWS, COLUMNS)
    values = tl.load(x + row * apart + column, mask=inside, other=0.0).to(tl.float32)
    arriving = tl.load(gradient + row * apart_2 + column, mask=inside, other=0.0).to(tl.float32)
    share, slope = _share(values, TANH)
    tl.store(of_x + row * width + column, arriving * (share + values * slope), mask=inside)
