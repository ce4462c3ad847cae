"""Modulation of tokens by a vector of each image, in one memory pass forward and one backward.

Diffusion transformers scale and shift what a norm returns, and multiply a branch by a gate before it is added. PyTorch
reads broadcast vectors element by element, and goes back over the tokens once more for each gradient of a vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._triton import tl, triton
from .kernel import Draw, Kernel
from .launch import launch

# A row of a tile takes all threads of its program, eight elements each. So a thread keeps its part of the vectors, and
# adds up its part of their gradients.
_WARPS, _COLUMNS = 2, 512
_ROWS = 8  # of a tile
_BACKWARD_PROGRAMS = 1024  # about as many at most, as each leaves partial sums
_REDUCE_SPLITS, _REDUCE_COLUMNS = 64, 32  # of a tile of partial sums
_MAX_GRID = 65535  # programs along the second and third axis


def modulate(x: Tensor, factor: Tensor, addend: Tensor | None) -> Tensor:
    """Compute x · factor + addend (Peebles, Xie 2022, arXiv 2212.09748, section 3.2), or x · factor.

    Args:
        x: (n, tokens, d) in any layout, float32, float16 or bfloat16. Computed in float32 within.
        factor: (n, 1, d), of x's dtype.
        addend: None; or (n, 1, d) or (n, tokens, d), of x's dtype.

    Returns:
        Contiguous, of x's shape and dtype. Gradients of vectors are summed in float32.
    """
    return _Modulate.apply(x, factor, addend)


def supports(x: Tensor, factor: Tensor, addend: Tensor | None) -> bool:
    """One dtype, and one vector of each image."""
    if x.dim() != 3 or x.numel() == 0 or x.shape[0] > _MAX_GRID or x.shape[1] > _MAX_GRID * _ROWS:
        return False
    vector = (x.shape[0], 1, x.shape[2])
    shapes = factor.shape == vector and (addend is None or addend.shape in (vector, x.shape))
    return shapes and all(it is None or (it.dtype, it.device) == (x.dtype, x.device) for it in (factor, addend))


def reference(x: Tensor, factor: Tensor, addend: Tensor | None) -> Tensor:
    """Compute modulate in plain PyTorch."""
    return x * factor if addend is None else torch.addcmul(addend, x, factor)


def examples(draw: Draw) -> Iterator[tuple[Any, ...]]:
    """A shift and a scale that are parts of one tensor, a gate, a gate with a sum, and a constant gate."""
    x = draw(2, 40, 320).requires_grad_()
    shift, factor = draw(2, 1, 640).chunk(2, dim=-1)
    yield x, factor.requires_grad_(), shift.requires_grad_()
    yield x, factor, None
    yield x, factor, draw(2, 40, 320).requires_grad_()
    yield x, factor.detach(), None


KERNEL = Kernel("transformer", modulate, supports, reference, examples)


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, addend: Tensor | None) -> Tensor:
        ctx.is_vector = addend is not None and addend.shape == factor.shape
        ctx.needs_sums = ctx.needs_input_grad[1] or (ctx.is_vector and ctx.needs_input_grad[2])
        # A constant factor needs no x, which may then be freed.
        ctx.save_for_backward(factor, x if ctx.needs_sums else None)
        return _modulated(x, factor, addend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        factor, x = ctx.saved_tensors
        if not ctx.needs_sums:
            return _modulated(grad_output, factor, None), None, grad_output if ctx.needs_input_grad[2] else None
        grad_x, sums = _gradients(x, factor, grad_output, ctx.is_vector)
        return grad_x, sums[0], sums[1] if ctx.is_vector else grad_output if ctx.needs_input_grad[2] else None


def _modulated(x: Tensor, factor: Tensor, addend: Tensor | None) -> Tensor:
    x, factor, output = _rows(x), _rows(factor), x.new_empty(x.shape)
    added = x if addend is None else _rows(addend)  # x is not read then
    n, rows, width = x.shape
    with torch.cuda.device_of(x):
        launch(
            _forward,
            (triton.cdiv(width, _COLUMNS), triton.cdiv(rows, _ROWS), n),
            x,
            factor,
            added,
            output,
            rows,
            width,
            *x.stride()[:2],
            factor.stride(0),
            *added.stride()[:2],
            addend is not None,
            addend is not None and addend.shape != factor.shape,
            _ROWS,
            _COLUMNS,
            num_warps=_WARPS,
        )
    return output


def _gradients(x: Tensor, factor: Tensor, grad_output: Tensor, with_addend: bool) -> tuple[Tensor, Tensor]:
    """The gradient of x, and those of the factor and, if wanted, of the vector addend: (1 or 2, n, 1, d)."""
    x, factor, grad, grad_x = _rows(x), _rows(factor), _rows(grad_output), x.new_empty(x.shape)
    n, rows, width = x.shape
    tiles, steps = triton.cdiv(width, _COLUMNS), triton.cdiv(rows, _ROWS)
    rows_per_split = _ROWS * triton.cdiv(steps * tiles * n, _BACKWARD_PROGRAMS)
    splits = triton.cdiv(rows, rows_per_split)
    partial_sums = x.new_empty(1 + with_addend, n, splits, width, dtype=torch.float32)
    sums = x.new_empty(1 + with_addend, n, 1, width)
    with torch.cuda.device_of(x):
        launch(
            _backward,
            (tiles, splits, n),
            x,
            factor,
            grad,
            grad_x,
            partial_sums,
            rows,
            width,
            *x.stride()[:2],
            factor.stride(0),
            *grad.stride()[:2],
            rows_per_split,
            with_addend,
            _ROWS,
            _COLUMNS,
            num_warps=_WARPS,
        )
        grid = triton.cdiv(width, _REDUCE_COLUMNS), n, 1 + with_addend
        launch(_reduce, grid, partial_sums, sums, splits, width, _REDUCE_SPLITS, _REDUCE_COLUMNS)
    return grad_x, sums


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit(do_not_specialize=["rows"])
def _forward(  # type: ignore[no-untyped-def]
    x,
    factor,
    addend,
    output,
    rows,
    width,
    stride_n: tl.int64,
    stride: tl.int64,
    factor_stride: tl.int64,
    addend_stride_n: tl.int64,
    addend_stride: tl.int64,
    ADDEND: tl.constexpr,
    ADDEND_OF_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    n = tl.program_id(2)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = (row < rows) & (column < width)
    # Vectors first: Triton computes in the layout of the last load, and moves what was loaded before to it.
    factors = tl.load(factor + n * factor_stride + column, mask=column < width, other=0.0).to(tl.float32)
    if ADDEND_OF_ROWS:
        start = addend + n * addend_stride_n + row * addend_stride
        added = tl.load(start + column, mask=mask, other=0.0).to(tl.float32)
    elif ADDEND:
        added = tl.load(addend + n * addend_stride_n + column, mask=column < width, other=0.0).to(tl.float32)
    values = tl.load(x + n * stride_n + row * stride + column, mask=mask, other=0.0).to(tl.float32) * factors
    if ADDEND:
        values += added
    tl.store(output + (n.to(tl.int64) * rows + row) * width + column, values, mask=mask)


@triton.jit(do_not_specialize=["rows", "rows_per_split"])
def _backward(  # type: ignore[no-untyped-def]
    x,
    factor,
    grad_output,
    grad_x,
    partial_sums,
    rows,
    width,
    stride_n: tl.int64,
    stride: tl.int64,
    factor_stride: tl.int64,
    grad_stride_n: tl.int64,
    grad_stride: tl.int64,
    rows_per_split,
    ADDEND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """grad_x, and the program's parts of Σ grad · x and, with an addend, of Σ grad over the rows."""
    split, n = tl.program_id(1), tl.program_id(2)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    column = columns[None, :]
    factors = tl.load(factor + n * factor_stride + column, mask=column < width, other=0.0).to(tl.float32)
    of_factor = tl.zeros((COLUMNS,), tl.float32)
    of_addend = tl.zeros((COLUMNS,), tl.float32)
    begin = split * rows_per_split
    for first in range(begin, tl.minimum(begin + rows_per_split, rows), ROWS):
        row = (first + tl.arange(0, ROWS))[:, None]
        mask = (row < rows) & (column < width)
        values = tl.load(x + n * stride_n + row * stride + column, mask=mask, other=0.0).to(tl.float32)
        start = grad_output + n * grad_stride_n + row * grad_stride
        grad = tl.load(start + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x + (n.to(tl.int64) * rows + row) * width + column, grad * factors, mask=mask)
        of_factor += tl.sum(grad * values, 0)
        if ADDEND:
            of_addend += tl.sum(grad, 0)
    splits = tl.num_programs(1)
    start = partial_sums + (n * splits + split) * width + columns
    tl.store(start, of_factor, mask=columns < width)
    if ADDEND:
        tl.store(start + tl.num_programs(2) * splits * width, of_addend, mask=columns < width)


@triton.jit(do_not_specialize=["splits"])
def _reduce(  # type: ignore[no-untyped-def]
    partial_sums, sums, splits, width, SPLITS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Sum (k, n, splits, width) over the splits, in a fixed order."""
    index = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((SPLITS, COLUMNS), tl.float32)
    for first in range(0, splits, SPLITS):
        split = (first + tl.arange(0, SPLITS))[:, None]
        start = partial_sums + (index * splits + split) * width
        total += tl.load(start + column[None, :], mask=(split < splits) & (column < width)[None, :], other=0.0)
    tl.store(sums + index * width + column, tl.sum(total, 0), mask=column < width)
