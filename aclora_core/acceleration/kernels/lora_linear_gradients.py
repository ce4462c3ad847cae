"""Linear layers with their LoRA branches: the gradients of the factors, in one kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ._linear_tiles import pointer_offset, pointer_offsets, supports_rows
from ._tiles import accumulate_outer, add_block, load_block, padded_rank, plan_split_k, split_k_reduce
from ._triton import tl, triton
from .kernel import Draw, Kernel
from .launch import launch

_BLOCK_K = 128  # rows that a program sums over in one step
_BLOCK_N = 64  # columns of a program's sums
_TILE = 128  # sides of a tile of the input's gradient
_MAX_ROWS = 16384  # beyond which PyTorch is faster, as it splits long sums among more programs


def lora_linear_gradients(
    x: Tensor,
    grad_outputs: Sequence[Tensor],
    x_down: Tensor,
    grad_up: Tensor,
    down_grads: Sequence[Tensor],
    up_grads: Sequence[Tensor],
    scale: float,
    grad_input: Tensor | None = None,
    down: Tensor | None = None,
) -> None:
    """Add the gradients of the factors, s · grad_upᵀ x and s · gᵀ x_down, of up to MAX_LAYERS layers.

    Args:
        x: (rows, in), the input of the layers.
        grad_outputs: g, (rows, out) of each layer, the strides of their rows equal.
        x_down: (layers, rows, rank), from lora_linear.
        grad_up: (layers, rows, rank), from lora_linear_backward.
        down_grads: (rank, in) of each layer, to add to.
        up_grads: (out, rank) of each layer, to add to.
        scale: s = alpha / rank.
        grad_input: (rows, in), contiguous; if given, s · grad_up · down is added to it. For a single layer only.
        down: (rank, in), needed with grad_input.
    """
    (rows, inputs), (outputs, rank) = x.shape, up_grads[0].shape
    sums = len(grad_outputs) * (triton.cdiv(outputs, _BLOCK_N) + triton.cdiv(inputs, _BLOCK_N))
    split_k = plan_split_k(rows, sums, _BLOCK_K, _BLOCK_N * padded_rank(rank), x.device)
    tiles = 0 if grad_input is None else triton.cdiv(rows, _TILE) * triton.cdiv(inputs, _TILE)
    with torch.cuda.device_of(x):
        launch(
            _add_gradients,
            (sums * split_k.splits + tiles,),
            x,
            grad_outputs[0],
            x_down,
            grad_up,
            down_grads[0],
            up_grads[0],
            x if grad_input is None else grad_input,
            x if down is None else down,
            *split_k,
            scale,
            rows,
            outputs,
            inputs,
            x.stride(0),
            grad_outputs[0].stride(0),
            sums,
            *pointer_offsets(grad_outputs),
            *pointer_offsets(down_grads),
            *pointer_offsets(up_grads),
            rank,
            padded_rank(rank),
            _BLOCK_N,
            _BLOCK_K,
            _TILE,
            num_stages=5,
        )


def supports(x: Tensor, grad_outputs: Sequence[Tensor], down_grads: Sequence[Tensor]) -> bool:
    """Half precision, and no longer sums than pay off."""
    rank = len(down_grads[0])
    return supports_rows(x, rank) and supports_rows(grad_outputs[0], rank) and len(x) <= _MAX_ROWS


def reference(
    x: Tensor,
    grad_outputs: Sequence[Tensor],
    x_down: Tensor,
    grad_up: Tensor,
    down_grads: Sequence[Tensor],
    up_grads: Sequence[Tensor],
    scale: float,
    grad_input: Tensor | None = None,
    down: Tensor | None = None,
) -> None:
    """Do lora_linear_gradients in plain PyTorch."""
    for layer, grad_output in enumerate(grad_outputs):
        up_grads[layer].addmm_(grad_output.t(), x_down[layer], alpha=scale)
        down_grads[layer].addmm_(grad_up[layer].t(), x, alpha=scale)
    if grad_input is not None and down is not None:
        grad_input.addmm_(grad_up[0], down, alpha=scale)


def examples(draw: Draw) -> Iterator[tuple[Any, ...]]:
    """Two layers, and so many rows that their sums are split."""
    rows = 2100
    activations = draw(rows, 128), [*draw(2, rows, 192)], draw(2, rows, 16), draw(2, rows, 16)
    yield *activations, [*draw(2, 16, 128)], [*draw(2, 192, 16)], 0.5


KERNEL = Kernel("lora", lora_linear_gradients, supports, reference, examples)


@triton.jit(do_not_specialize=["splits", "rows_per_split", "scale", "rows", "sums"])
def _add_gradients(  # type: ignore[no-untyped-def]
    x,
    grad_output,
    x_down,
    grad_up,
    down_grad,
    up_grad,
    grad_input,
    down,
    scratch,
    arrived,
    splits,
    rows_per_split,
    scale,
    rows,
    outputs,
    inputs,
    stride,
    grad_stride,
    sums,
    grad_output_2: tl.int64,
    grad_output_3: tl.int64,
    down_grad_2: tl.int64,
    down_grad_3: tl.int64,
    up_grad_2: tl.int64,
    up_grad_3: tl.int64,
    RANK: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0)
    if program >= sums * splits:
        _add_to_input(grad_input, grad_up, down, scale, rows, inputs, program - sums * splits, RANK, PADDED_RANK, TILE)
    else:
        index, split, ranks = program % sums, program // sums, tl.arange(0, PADDED_RANK)
        begin, end = split * rows_per_split, tl.minimum(split * rows_per_split + rows_per_split, rows)
        up_blocks = tl.cdiv(outputs, BLOCK_N)
        layer_blocks = up_blocks + tl.cdiv(inputs, BLOCK_N)
        layer, block = index // layer_blocks, index % layer_blocks
        if block < up_blocks:
            added = accumulate_outer(
                grad_output + pointer_offset(layer, grad_output_2, grad_output_3),
                x_down + layer * rows * RANK,
                begin,
                end,
                outputs,
                grad_stride,
                block,
                RANK,
                PADDED_RANK,
                BLOCK_N,
                BLOCK_K,
            )
            is_last, added = split_k_reduce(added, scratch, arrived, index, split, splits, BLOCK_N, PADDED_RANK)
            if is_last:
                start = up_grad + pointer_offset(layer, up_grad_2, up_grad_3)
                add_block(start, block * BLOCK_N + tl.arange(0, BLOCK_N), ranks, RANK, outputs, RANK, scale * added)
        else:
            block -= up_blocks
            added = accumulate_outer(
                x,
                grad_up + layer * rows * RANK,
                begin,
                end,
                inputs,
                stride,
                block,
                RANK,
                PADDED_RANK,
                BLOCK_N,
                BLOCK_K,
            )
            is_last, added = split_k_reduce(added, scratch, arrived, index, split, splits, BLOCK_N, PADDED_RANK)
            if is_last:
                start = down_grad + pointer_offset(layer, down_grad_2, down_grad_3)
                column = block * BLOCK_N + tl.arange(0, BLOCK_N)
                add_block(start, ranks, column, inputs, RANK, inputs, scale * tl.trans(added))


@triton.jit
def _add_to_input(  # type: ignore[no-untyped-def]
    grad_input,
    grad_up,
    down,
    scale,
    rows,
    inputs,
    tile,
    RANK: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Add a tile of s · grad_up · down."""
    tile_columns = tl.cdiv(inputs, TILE)
    row, column = tile // tile_columns * TILE + tl.arange(0, TILE), tile % tile_columns * TILE + tl.arange(0, TILE)
    ranks = tl.arange(0, PADDED_RANK)
    h = load_block(grad_up, row, ranks, RANK, rows, RANK)
    added = tl.dot(h, load_block(down, ranks, column, inputs, RANK, inputs))
    add_block(grad_input, row, column, inputs, rows, inputs, scale * added)
