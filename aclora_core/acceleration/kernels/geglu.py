"""GEGLU, the gated GELU of transformers, in one memory pass forward and one backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import tl, triton
from .kernel import Draw, Kernel
from .launch import launch

_ROWS, _COLUMNS = 8, 256  # of a tile; a power of two that divides the usual widths


def geglu(hidden: Tensor) -> Tensor:
    """Compute value · GELU(gate), where hidden = (value, gate) and GELU(x) = x · Φ(x) (Hendrycks, Gimpel 2016).

    Args:
        hidden: (..., 2d), float32, float16 or bfloat16. Computed in float32 within.

    Returns:
        (..., d) in the dtype of hidden.
    """
    return _Geglu.apply(hidden)


def supports(hidden: Tensor) -> bool:
    """Any shape and layout."""
    return True


def reference(hidden: Tensor) -> Tensor:
    """Compute geglu in plain PyTorch."""
    value, gate = hidden.chunk(2, dim=-1)
    return value * F.gelu(gate)


def examples(draw: Draw) -> Iterator[tuple[Any, ...]]:
    """Fewer rows than a tile has."""
    yield (draw(3, 512).requires_grad_(),)


KERNEL = Kernel("unet", geglu, supports, reference, examples)


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
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (hidden,) = ctx.saved_tensors
        grad_output, grad_hidden = grad_output.contiguous(), torch.empty_like(hidden)
        width = grad_output.shape[-1]
        rows = grad_output.numel() // width
        with torch.cuda.device_of(hidden):
            launch(_backward, _grid(rows, width), hidden, grad_output, grad_hidden, rows, width, _ROWS, _COLUMNS)
        return grad_hidden


def _grid(rows: int, width: int) -> tuple[int, int]:
    return triton.cdiv(rows, _ROWS), triton.cdiv(width, _COLUMNS)


@triton.jit
def _tile(rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row offsets of a program's tile of the output, its columns, and the mask of what lies within the tensor."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    return row.to(tl.int64)[:, None] * width, column[None, :], mask


@triton.jit
def normal_cdf(x):  # type: ignore[no-untyped-def]
    """Φ(x), the cumulative distribution function of the standard normal distribution."""
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@triton.jit(do_not_specialize=["rows"])
def _forward(hidden, output, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column, mask = _tile(rows, width, ROWS, COLUMNS)
    value = tl.load(hidden + 2 * row + column, mask=mask).to(tl.float32)
    gate = tl.load(hidden + 2 * row + width + column, mask=mask).to(tl.float32)
    tl.store(output + row + column, value * gate * normal_cdf(gate), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _backward(hidden, grad_output, grad_hidden, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column, mask = _tile(rows, width, ROWS, COLUMNS)
    value = tl.load(hidden + 2 * row + column, mask=mask).to(tl.float32)
    gate = tl.load(hidden + 2 * row + width + column, mask=mask).to(tl.float32)
    grad = tl.load(grad_output + row + column, mask=mask).to(tl.float32)
    cdf = normal_cdf(gate)
    derivative = cdf + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    tl.store(grad_hidden + 2 * row + column, grad * gate * cdf, mask=mask)
    tl.store(grad_hidden + 2 * row + width + column, grad * value * derivative, mask=mask)
