"""Linear layers with their LoRA branches: the gradient of their common input, in one kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ._linear_tiles import grouped_tile, pointer_offset, pointer_offsets, supports_weight, tile_for
from ._tiles import load_block, padded_rank, store_block
from ._triton import tl, triton
from .kernel import Draw, Kernel
from .launch import launch

_MAX_WEIGHT = 2e6  # elements of a weight beyond which PyTorch's matrix product is faster


def lora_linear_backward(
    grad_outputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute the sum over the layers of g W + s · (g up) down. All tensors are float16, or all bfloat16.

    Args:
        grad_outputs: g, (rows, out) of each layer, the strides of their rows equal; everything else is contiguous.
        weights: (out, in) of each layer.
        downs: (rank, in) of each layer.
        ups: (out, rank) of each layer.
        scale: s = alpha / rank.

    Returns:
        The gradient of the input (rows, in), and grad_up = g up (layers, rows, rank).
    """
    (rows, outputs), (rank, inputs) = grad_outputs[0].shape, downs[0].shape
    grad_input = grad_outputs[0].new_empty(rows, inputs)
    grad_up = grad_outputs[0].new_empty(len(weights), rows, rank)
    block_m, block_n, block_k, warps, stages = tile_for(rows)
    with torch.cuda.device_of(grad_input):
        launch(
            _backward,
            (triton.cdiv(rows, block_m) * triton.cdiv(inputs, block_n),),
            grad_outputs[0],
            weights[0],
            downs[0],
            ups[0],
            grad_input,
            grad_up,
            scale,
            rows,
            outputs,
            inputs,
            grad_outputs[0].stride(0),
            *pointer_offsets(grad_outputs),
            *pointer_offsets(weights),
            *pointer_offsets(downs),
            *pointer_offsets(ups),
            len(weights),
            rank,
            padded_rank(rank),
            block_m,
            block_n,
            block_k,
            num_warps=warps,
            num_stages=stages,
        )
    return grad_input, grad_up


def supports(grad_outputs: Sequence[Tensor], weights: Sequence[Tensor], downs: Sequence[Tensor]) -> bool:
    """Half precision, sides in whole blocks, and weights no larger than pays off."""
    return supports_weight(grad_outputs[0], weights[0], len(downs[0])) and weights[0].numel() <= _MAX_WEIGHT


def reference(
    grad_outputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute lora_linear_backward in plain PyTorch."""
    grad_up = torch.stack([grad_output @ up for grad_output, up in zip(grad_outputs, ups, strict=True)])
    grad_input = torch.zeros(len(grad_outputs[0]), weights[0].shape[1]).to(grad_outputs[0])
    for layer, grad_output in enumerate(grad_outputs):
        grad_input += grad_output @ weights[layer] + scale * grad_up[layer] @ downs[layer]
    return grad_input, grad_up


def examples(draw: Draw) -> Iterator[tuple[Any, ...]]:
    """Two layers, and enough rows for the largest tile."""
    yield [*draw(2, 2100, 192)], [*draw(2, 192, 128)], [*draw(2, 16, 128)], [*draw(2, 192, 16)], 0.5


KERNEL = Kernel("lora", lora_linear_backward, supports, reference, examples)


@triton.jit(do_not_specialize=["scale", "rows"])
def _backward(  # type: ignore[no-untyped-def]
    grad_output,
    weight,
    down,
    up,
    grad_input,
    grad_up,
    scale,
    rows,
    outputs,
    inputs,
    stride,
    grad_output_2: tl.int64,
    grad_output_3: tl.int64,
    weight_2: tl.int64,
    weight_3: tl.int64,
    down_2: tl.int64,
    down_3: tl.int64,
    up_2: tl.int64,
    up_3: tl.int64,
    LAYERS: tl.constexpr,
    RANK: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first_row, first_column = grouped_tile(tl.program_id(0), rows, inputs, BLOCK_M, BLOCK_N)
    row, column = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    ranks, k = tl.arange(0, PADDED_RANK), tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for layer in tl.static_range(LAYERS):
        grad_ptr = grad_output + pointer_offset(layer, grad_output_2, grad_output_3)
        grad_ptr += (row % rows)[:, None] * stride + k[None, :]
        weight_ptr = weight + pointer_offset(layer, weight_2, weight_3)
        weight_ptr += k[:, None] * inputs + (column % inputs)[None, :]
        up_ptr = up + pointer_offset(layer, up_2, up_3) + k[:, None] * RANK + (ranks % RANK)[None, :]
        h = tl.zeros((BLOCK_M, PADDED_RANK), tl.float32)
        for _ in range(0, outputs, BLOCK_K):
            values = tl.load(grad_ptr)
            total = tl.dot(values, tl.load(weight_ptr), total)
            h = tl.dot(values, tl.load(up_ptr), h)
            grad_ptr += BLOCK_K
            weight_ptr += BLOCK_K * inputs
            up_ptr += BLOCK_K * RANK
        h_rounded = h.to(grad_output.dtype.element_ty)
        down_ptr = down + pointer_offset(layer, down_2, down_3)
        total += scale * tl.dot(h_rounded, load_block(down_ptr, ranks, column, inputs, RANK, inputs))
        if first_column == 0:
            store_block(grad_up + layer * rows * RANK, row, ranks, RANK, rows, RANK, h_rounded)
    store_block(grad_input, row, column, inputs, rows, inputs, total)
