"""GELU of rows with a stride, one kernel forward and one backward.

A layer's output may hold several parts side by side. PyTorch takes four times as long for one part as for a tensor of
its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import tl, triton
from .geglu import normal_cdf
from .kernel import Draw, Kernel
from .launch import launch

_ROWS, _COLUMNS = 4, 512  # of a tile


def gelu(x: Tensor, tanh: bool) -> Tensor:
    """Compute x · Φ(x), or its tanh approximation (Hendrycks, Gimpel 2016, arXiv 1606.08415, section 2).

    Args:
        x: (..., d) in any layout, float32, float16 or bfloat16. Computed in float32 within.
        tanh: use the approximation.

    Returns:
        Contiguous, of x's shape and dtype.
    """
    return _Gelu.apply(x, tanh)


def supports(x: Tensor) -> bool:
    """Any shape; PyTorch is as fast where x is contiguous."""
    return not x.is_contiguous()


def reference(x: Tensor, tanh: bool) -> Tensor:
    """Compute gelu in plain PyTorch."""
    return F.gelu(x, approximate="tanh" if tanh else "none")


def examples(draw: Draw) -> Iterator[tuple[Any, ...]]:
    """Half of wider rows, exactly and approximated."""
    for tanh in (True, False):
        yield draw(9, 640)[:, :320].requires_grad_(), tanh


KERNEL = Kernel("transformer", gelu, supports, reference, examples)


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
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        rows, grad_rows, grad_x = _rows(x), _rows(grad_output), x.new_empty(x.shape)
        strides = rows.stride(0), grad_rows.stride(0)
        with torch.cuda.device_of(x):
            launch(_backward, _grid(rows), rows, grad_rows, grad_x, *rows.shape, *strides, ctx.tanh, _ROWS, _COLUMNS)
        return grad_x, None


def _rows(x: Tensor) -> Tensor:
    """(rows, d), without a copy if the last axis is contiguous and the others have one common stride."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _grid(rows: Tensor) -> tuple[int, int]:
    return triton.cdiv(rows.shape[0], _ROWS), triton.cdiv(rows.shape[1], _COLUMNS)


@triton.jit
def _tile(rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program's rows and columns, and the mask of what lies within the tensor."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    return row.to(tl.int64), column, (row < rows) & (column < width)


@triton.jit
def _cdf(x, TANH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Φ(x) or its approximation, and its derivative."""
    if TANH:  # (1 + tanh u) / 2 is the logistic function of 2u
        two_u = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        cdf = tl.sigmoid(tl.minimum(tl.maximum(two_u, -80.0), 80.0))
        derivative = cdf * (1 - cdf) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    else:
        cdf = normal_cdf(x)
        derivative = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return cdf, derivative


@triton.jit(do_not_specialize=["rows"])
def _forward(  # type: ignore[no-untyped-def]
    x, output, rows, width, stride: tl.int64, TANH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row, column, mask = _tile(rows, width, ROWS, COLUMNS)
    values = tl.load(x + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    cdf, _ = _cdf(values, TANH)
    tl.store(output + row * width + column, values * cdf, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _backward(  # type: ignore[no-untyped-def]
    x,
    grad_output,
    grad_x,
    rows,
    width,
    stride: tl.int64,
    grad_stride: tl.int64,
    TANH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column, mask = _tile(rows, width, ROWS, COLUMNS)
    values = tl.load(x + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_output + row * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
    cdf, derivative = _cdf(values, TANH)
    tl.store(grad_x + row * width + column, grad * (cdf + values * derivative), mask=mask)
