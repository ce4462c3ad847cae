"""Linear layers together with their LoRA branches: one kernel forwards, two on the way back. It needs Triton.

A branch by itself is thin products, each of which takes about as long as it takes to start it. Here they ride on the
layer's own product, which reads the same rows anyway. Up to three layers of one size that read the same tensor share
the launches, and what they give back to it is summed up where it is computed. Sums are float32, in a fixed order.

Tensors of several layers are given to a kernel as the address of the first and the distances of the others, which are
64 bits wide always: Triton would compile anew for each that needs them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from . import DEEP, MAX_LAYERS
from ._tiles import add, block, joined, padded, share_out, store, summed
from .launch import launch

# Sides of a tile, depth, warps and stages, by the number of rows: on an H100 the quickest of those tried.
_TILES = (
    (16, (16, 32, DEEP, 2, 5)),
    (512, (64, 64, DEEP, 4, 4)),
    (1 << 40, (64, 128, DEEP, 4, 4)),
)
_SUMMED = 128  # rows that the gradients of the factors are summed up from at a time
_ACROSS = 64  # columns of a program that sums them
_TILE = 128  # sides of a tile of the input's gradient


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """x (rows, in) -> x Wᵀ + b + s · (x downᵀ) upᵀ (layers, rows, out), and x downᵀ (layers, rows, rank).

    weights: (out, in); biases: (out,), or none at all; downs: (rank, in); ups: (out, rank). All are float16 or all
    bfloat16, contiguous but for the rows of x, which may lie apart.
    """
    (rows, inputs), (outputs, rank) = x.shape, ups[0].shape
    output, inner = x.new_empty(len(weights), rows, outputs), x.new_empty(len(weights), rows, rank)
    high, wide, deep, warps, stages = _tile_for(rows)
    programs = len(weights) * triton.cdiv(rows, high) * triton.cdiv(outputs, wide)
    with torch.cuda.device_of(x):
        launch(
            _forward,
            (programs,),
            x,
            weights[0],
            biases[0] if biases else x,
            downs[0],
            ups[0],
            output,
            inner,
            scale,
            rows,
            outputs,
            inputs,
            x.stride(0),
            *_distances(weights),
            *_distances(biases),
            *_distances(downs),
            *_distances(ups),
            len(biases),
            rank,
            padded(rank),
            high,
            wide,
            deep,
            num_warps=warps,
            num_stages=stages,
        )
    return output, inner


def backward(
    gradients: Sequence[Tensor], weights: Sequence[Tensor], downs: Sequence[Tensor], ups: Sequence[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients (rows, out) of the layers' outputs -> that of their input, (rows, in), and g · up (layers, rows, rank).

    The first is the sum over the layers of g W + s · (g up) down. The gradients' rows lie equally far apart.
    """
    (rows, outputs), (rank, inputs) = gradients[0].shape, downs[0].shape
    of_input, through = gradients[0].new_empty(rows, inputs), gradients[0].new_empty(len(weights), rows, rank)
    high, wide, deep, warps, stages = _tile_for(rows)
    with torch.cuda.device_of(of_input):
        launch(
            _backward,
            (triton.cdiv(rows, high) * triton.cdiv(inputs, wide),),
            gradients[0],
            weights[0],
            downs[0],
            ups[0],
            of_input,
            through,
            scale,
            rows,
            outputs,
            inputs,
            gradients[0].stride(0),
            *_distances(gradients),
            *_distances(weights),
            *_distances(downs),
            *_distances(ups),
            len(weights),
            rank,
            padded(rank),
            high,
            wide,
            deep,
            num_warps=warps,
            num_stages=stages,
        )
    return of_input, through


def add_gradients(
    x: Tensor,
    gradients: Sequence[Tensor],
    inner: Tensor,
    through: Tensor,
    of_downs: Sequence[Tensor],
    of_ups: Sequence[Tensor],
    scale: float,
    of_input: Tensor | None = None,
    down: Tensor | None = None,
) -> None:
    """Adds s · throughᵀ x to of_downs (rank, in) and s · gᵀ inner to of_ups (out, rank), for each of the layers.

    inner, through: (layers, rows, rank), as forward and backward give them. of_input: (rows, in), contiguous; given
    with the down of a lone layer, s · through · down is added to it.
    """
    (rows, inputs), (outputs, rank) = x.shape, of_ups[0].shape
    sums = len(gradients) * (triton.cdiv(outputs, _ACROSS) + triton.cdiv(inputs, _ACROSS))
    shares = share_out(rows, sums, _SUMMED, _ACROSS * padded(rank), x.device)
    tiles = 0 if of_input is None else triton.cdiv(rows, _TILE) * triton.cdiv(inputs, _TILE)
    with torch.cuda.device_of(x):
        launch(
            _add_gradients,
            (sums * shares.parts + tiles,),
            x,
            gradients[0],
            inner,
            through,
            of_downs[0],
            of_ups[0],
            x if of_input is None else of_input,
            x if down is None else down,
            *shares,
            scale,
            rows,
            outputs,
            inputs,
            x.stride(0),
            gradients[0].stride(0),
            sums,
            *_distances(gradients),
            *_distances(of_downs),
            *_distances(of_ups),
            rank,
            padded(rank),
            _ACROSS,
            _SUMMED,
            _TILE,
            num_stages=5,
        )


def _tile_for(rows: int) -> tuple[int, int, int, int, int]:
    return next(tile for most, tile in _TILES if rows <= most)


def _distances(tensors: Sequence[Tensor]) -> list[int]:
    """How many numbers after the first tensor the second and the third begin, of MOST_LAYERS."""
    begins = [(it.data_ptr() - tensors[0].data_ptr()) // it.element_size() for it in tensors[1:]]
    return begins + [0] * (MAX_LAYERS - 1 - len(begins))


@triton.jit
def _distance(layer, second, third):  # type: ignore[no-untyped-def]
    return tl.where(layer == 0, 0, tl.where(layer == 1, second, third)).to(tl.int64)


@triton.jit
def _tile(program, rows, columns, HIGH: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where a program's tile begins; eight rows of tiles go together, for their operands' sake."""
    down, across = tl.cdiv(rows, HIGH), tl.cdiv(columns, WIDE)
    first = program // (8 * across) * 8
    together = tl.minimum(down - first, 8)
    rest = program % (8 * across)
    return (first + rest % together) * HIGH, rest // together * WIDE


@triton.jit(do_not_specialize=["scale", "rows", "biases"])
def _forward(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    down,
    up,
    output,
    inner,
    scale,
    rows,
    outputs,
    inputs,
    stride,
    weight_2: tl.int64,
    weight_3: tl.int64,
    bias_2: tl.int64,
    bias_3: tl.int64,
    down_2: tl.int64,
    down_3: tl.int64,
    up_2: tl.int64,
    up_3: tl.int64,
    biases,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    DEEP: tl.constexpr,
):
    tiles = tl.cdiv(rows, HIGH) * tl.cdiv(outputs, WIDE)
    layer = tl.program_id(0) // tiles
    weight += _distance(layer, weight_2, weight_3)
    bias += _distance(layer, bias_2, bias_3)
    down += _distance(layer, down_2, down_3)
    up += _distance(layer, up_2, up_3)
    top, left = _tile(tl.program_id(0) % tiles, rows, outputs, HIGH, WIDE)
    row, column = top + tl.arange(0, HIGH), left + tl.arange(0, WIDE)
    ranks, deep = tl.arange(0, PADDED), tl.arange(0, DEEP)
    # What lies outside is read from inside and not stored.
    of_x = x + (row % rows)[:, None] * stride + deep[None, :]
    of_weight = weight + (column % outputs)[None, :] * inputs + deep[:, None]
    of_down = down + (ranks % RANK)[None, :] * inputs + deep[:, None]
    total, narrow = tl.zeros((HIGH, WIDE), tl.float32), tl.zeros((HIGH, PADDED), tl.float32)
    for _ in range(0, inputs, DEEP):
        values = tl.load(of_x)
        total = tl.dot(values, tl.load(of_weight), total)
        narrow = tl.dot(values, tl.load(of_down), narrow)
        of_x += DEEP
        of_weight += DEEP
        of_down += DEEP
    short = narrow.to(x.dtype.element_ty)
    total += scale * tl.dot(short, tl.trans(block(up, column, ranks, RANK, outputs, RANK)))
    total += tl.load(bias + column, mask=(column < outputs) & (biases > 0), other=0.0).to(tl.float32)[None, :]
    store(output + layer.to(tl.int64) * rows * outputs, row, column, outputs, rows, outputs, total)
    if left == 0:
        store(inner + layer * rows * RANK, row, ranks, RANK, rows, RANK, short)


@triton.jit(do_not_specialize=["scale", "rows"])
def _backward(  # type: ignore[no-untyped-def]
    gradient,
    weight,
    down,
    up,
    of_input,
    through,
    scale,
    rows,
    outputs,
    inputs,
    stride,
    gradient_2: tl.int64,
    gradient_3: tl.int64,
    weight_2: tl.int64,
    weight_3: tl.int64,
    down_2: tl.int64,
    down_3: tl.int64,
    up_2: tl.int64,
    up_3: tl.int64,
    LAYERS: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    DEEP: tl.constexpr,
):
    top, left = _tile(tl.program_id(0), rows, inputs, HIGH, WIDE)
    row, column = top + tl.arange(0, HIGH), left + tl.arange(0, WIDE)
    ranks, deep = tl.arange(0, PADDED), tl.arange(0, DEEP)
    total = tl.zeros((HIGH, WIDE), tl.float32)
    for layer in tl.static_range(LAYERS):
        of_gradient = gradient + _distance(layer, gradient_2, gradient_3)
        of_gradient += (row % rows)[:, None] * stride + deep[None, :]
        of_weight = weight + _distance(layer, weight_2, weight_3)
        of_weight += deep[:, None] * inputs + (column % inputs)[None, :]
        of_up = up + _distance(layer, up_2, up_3) + deep[:, None] * RANK + (ranks % RANK)[None, :]
        narrow = tl.zeros((HIGH, PADDED), tl.float32)
        for _ in range(0, outputs, DEEP):
            values = tl.load(of_gradient)
            total = tl.dot(values, tl.load(of_weight), total)
            narrow = tl.dot(values, tl.load(of_up), narrow)
            of_gradient += DEEP
            of_weight += DEEP * inputs
            of_up += DEEP * RANK
        short = narrow.to(gradient.dtype.element_ty)
        of_down = down + _distance(layer, down_2, down_3)
        total += scale * tl.dot(short, block(of_down, ranks, column, inputs, RANK, inputs))
        if left == 0:
            store(through + layer * rows * RANK, row, ranks, RANK, rows, RANK, short)
    store(of_input, row, column, inputs, rows, inputs, total)


@triton.jit(do_not_specialize=["parts", "each", "scale", "rows", "sums"])
def _add_gradients(  # type: ignore[no-untyped-def]
    x,
    gradient,
    inner,
    through,
    of_down,
    of_up,
    of_input,
    down,
    scratch,
    arrived,
    parts,
    each,
    scale,
    rows,
    outputs,
    inputs,
    stride,
    gradient_stride,
    sums,
    gradient_2: tl.int64,
    gradient_3: tl.int64,
    of_down_2: tl.int64,
    of_down_3: tl.int64,
    of_up_2: tl.int64,
    of_up_3: tl.int64,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    WIDE: tl.constexpr,
    DEEP: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0)
    if program >= sums * parts:
        _add_to_input(of_input, through, down, scale, rows, inputs, program - sums * parts, RANK, PADDED, TILE)
    else:
        number, part, ranks = program % sums, program // sums, tl.arange(0, PADDED)
        begin, end = part * each, tl.minimum(part * each + each, rows)
        ups = tl.cdiv(outputs, WIDE)
        of_layer = ups + tl.cdiv(inputs, WIDE)
        layer, place = number // of_layer, number % of_layer
        if place < ups:
            added = summed(
                gradient + _distance(layer, gradient_2, gradient_3),
                inner + layer * rows * RANK,
                begin,
                end,
                outputs,
                gradient_stride,
                place,
                RANK,
                PADDED,
                WIDE,
                DEEP,
            )
            last, added = joined(added, scratch, arrived, number, part, parts, WIDE, PADDED)
            if last:
                start = of_up + _distance(layer, of_up_2, of_up_3)
                add(start, place * WIDE + tl.arange(0, WIDE), ranks, RANK, outputs, RANK, scale * added)
        else:
            place -= ups
            added = summed(
                x, through + layer * rows * RANK, begin, end, inputs, stride, place, RANK, PADDED, WIDE, DEEP
            )
            last, added = joined(added, scratch, arrived, number, part, parts, WIDE, PADDED)
            if last:
                start = of_down + _distance(layer, of_down_2, of_down_3)
                add(start, ranks, place * WIDE + tl.arange(0, WIDE), inputs, RANK, inputs, scale * tl.trans(added))


@triton.jit
def _add_to_input(  # type: ignore[no-untyped-def]
    of_input, through, down, scale, rows, inputs, tile, RANK: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr
):
    """A tile of s · through · down."""
    across = tl.cdiv(inputs, TILE)
    row, column = tile // across * TILE + tl.arange(0, TILE), tile % across * TILE + tl.arange(0, TILE)
    ranks = tl.arange(0, PADDED)
    narrow = block(through, row, ranks, RANK, rows, RANK)
    added = tl.dot(narrow, block(down, ranks, column, inputs, RANK, inputs))
    add(of_input, row, column, inputs, rows, inputs, scale * added)
