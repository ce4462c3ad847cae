"""Linear layers with their LoRA branches, forward, in one kernel."""

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

_MAX_PRODUCTS = 5e9  # multiplications of a layer beyond which PyTorch's matrix product is faster


def lora_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute x Wᵀ + b + s · (x downᵀ) upᵀ of up to MAX_LAYERS layers. All tensors are float16, or all bfloat16.

    Args:
        x: (rows, in); its rows may have any stride, everything else is contiguous.
        weights: (out, in) of each layer.
        biases: (out,) of each layer, or empty.
        downs: (rank, in) of each layer.
        ups: (out, rank) of each layer.
        scale: s = alpha / rank.

    Returns:
        The outputs (layers, rows, out), and x_down = x downᵀ (layers, rows, rank).
    """
    (rows, inputs), (outputs, rank) = x.shape, ups[0].shape
    output, x_down = x.new_empty(len(weights), rows, outputs), x.new_empty(len(weights), rows, rank)
    block_m, block_n, block_k, warps, stages = tile_for(rows)
    programs = len(weights) * triton.cdiv(rows, block_m) * triton.cdiv(outputs, block_n)
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
            x_down,
            scale,
            rows,
            outputs,
            inputs,
            x.stride(0),
            *pointer_offsets(weights),
            *pointer_offsets(biases),
            *pointer_offsets(downs),
            *pointer_offsets(ups),
            len(biases),
            rank,
            padded_rank(rank),
            block_m,
            block_n,
            block_k,
            num_warps=warps,
            num_stages=stages,
        )
    return output, x_down


def supports(x: Tensor, weights: Sequence[Tensor], downs: Sequence[Tensor]) -> bool:
    """Half precision, sides in whole blocks, and no more multiplications than pay off."""
    return supports_weight(x, weights[0], len(downs[0])) and len(x) * weights[0].numel() <= _MAX_PRODUCTS


def reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute lora_linear in plain PyTorch."""
    x_down = torch.stack([x @ down.t() for down in downs])
    outputs = []
    for layer, weight in enumerate(weights):
        output = x @ weight.t() + scale * x_down[layer] @ ups[layer].t()
        outputs.append(output + biases[layer] if biases else output)
    return torch.stack(outputs), x_down


def examples(draw: Draw) -> Iterator[tuple[Any, ...]]:
    """Two layers, and enough rows for the largest tile."""
    yield draw(2100, 128), [*draw(2, 192, 128)], [*draw(2, 192)], [*draw(2, 16, 128)], [*draw(2, 192, 16)], 0.5


KERNEL = Kernel("lora", lora_linear, supports, reference, examples)


@triton.jit(do_not_specialize=["scale", "rows", "biases"])
def _forward(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    down,
    up,
    output,
    x_down,
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
    PADDED_RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(outputs, BLOCK_N)
    layer = tl.program_id(0) // tiles
    weight += pointer_offset(layer, weight_2, weight_3)
    bias += pointer_offset(layer, bias_2, bias_3)
    down += pointer_offset(layer, down_2, down_3)
    up += pointer_offset(layer, up_2, up_3)
    first_row, first_column = grouped_tile(tl.program_id(0) % tiles, rows, outputs, BLOCK_M, BLOCK_N)
    row, column = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    ranks, k = tl.arange(0, PADDED_RANK), tl.arange(0, BLOCK_K)
    # Indices beyond the edges wrap around; what is computed there is not stored.
    x_ptr = x + (row % rows)[:, None] * stride + k[None, :]
    weight_ptr = weight + (column % outputs)[None, :] * inputs + k[:, None]
    down_ptr = down + (ranks % RANK)[None, :] * inputs + k[:, None]
    total, h = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, PADDED_RANK), tl.float32)
    for _ in range(0, inputs, BLOCK_K):
        values = tl.load(x_ptr)
        total = tl.dot(values, tl.load(weight_ptr), total)
        h = tl.dot(values, tl.load(down_ptr), h)
        x_ptr += BLOCK_K
        weight_ptr += BLOCK_K
        down_ptr += BLOCK_K
    h_rounded = h.to(x.dtype.element_ty)
    total += scale * tl.dot(h_rounded, tl.trans(load_block(up, column, ranks, RANK, outputs, RANK)))
    total += tl.load(bias + column, mask=(column < outputs) & (biases > 0), other=0.0).to(tl.float32)[None, :]
    store_block(output + layer.to(tl.int64) * rows * outputs, row, column, outputs, rows, outputs, total)
    if first_column == 0:
        store_block(x_down + layer * rows * RANK, row, ranks, RANK, rows, RANK, h_rounded)
