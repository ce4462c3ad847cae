"""Convolutions with LoRA branches: the branch, forward, in two kernels.

For the libraries a convolution with 16 outputs is like any other: it takes as long as one with 64. Here the sum over
input channels and taps is split, so that a small image fills a GPU too. Sums are float32, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._conv_taps import (
    GEOMETRY_PARAMETERS,
    geometry_arguments,
    load_at_tap,
    load_tap_weights,
    pixel_position,
    shape_arguments,
    supports_images,
)
from ._tiles import add_block, load_block, padded_rank, store_block
from ._triton import tl, triton
from .kernel import ConvParams, Draw, Kernel
from .launch import launch

_PIXELS, _CHANNELS = 64, 64  # of a tile
_TARGET_PROGRAMS, _MAX_SPLITS = 264, 16  # that a sum is split into, in all and for one block of pixels
_OUTPUT_CHANNELS = 128  # of a tile of the output


def lora_conv(
    output: Tensor, bias: Tensor | None, x: Tensor, down: Tensor, up: Tensor, params: ConvParams, scale: float
) -> Tensor:
    """Add b + s · up(down * x) to a convolution's output. All tensors are float16, or all bfloat16.

    Args:
        output: (n, out, h', w'), channels last in memory as x and down are; changed in place.
        bias: (out,), or None.
        x: (n, in, h, w), the input of the convolution.
        down: (rank, in, kh, kw).
        up: (out, rank), contiguous.
        params: of the convolution.
        scale: s = alpha / rank.

    Returns:
        x_down = down * x as rows, (n · h' · w', rank).
    """
    (outputs, rank), pixels = up.shape, output.numel() // output.shape[1]
    blocks = triton.cdiv(pixels, _PIXELS)
    chunks = triton.cdiv(x.shape[1], _CHANNELS) * down[0, 0].numel()
    chunks_per_split = triton.cdiv(chunks, max(1, min(_MAX_SPLITS, _TARGET_PROGRAMS // blocks)))
    splits = triton.cdiv(chunks, chunks_per_split)
    sums = x.new_empty(splits, pixels, rank, dtype=torch.float32)
    x_down = x.new_empty(pixels, rank)
    with torch.cuda.device_of(x):
        launch(
            _partial_sums,
            (blocks, splits),
            x,
            down,
            sums,
            pixels,
            chunks_per_split,
            *shape_arguments(x, output),
            *geometry_arguments(down, params),
            rank,
            padded_rank(rank),
            _PIXELS,
            _CHANNELS,
        )
        launch(
            _reduce_and_add,
            (blocks, triton.cdiv(outputs, _OUTPUT_CHANNELS)),
            sums,
            x_down,
            up,
            up if bias is None else bias,
            output,
            scale,
            pixels,
            splits,
            outputs,
            int(bias is not None),
            rank,
            padded_rank(rank),
            _PIXELS,
            _OUTPUT_CHANNELS,
        )
    return x_down


def supports(x: Tensor, down: Tensor, up: Tensor) -> bool:
    """Half precision and channels in whole blocks."""
    return supports_images(x, len(up), len(down))


def reference(
    output: Tensor, bias: Tensor | None, x: Tensor, down: Tensor, up: Tensor, params: ConvParams, scale: float
) -> Tensor:
    """Do lora_conv in plain PyTorch."""
    x_down = F.conv2d(x, down, None, *params)
    output += scale * F.conv2d(x_down, up[:, :, None, None])
    if bias is not None:
        output += bias[:, None, None]
    return x_down.permute(0, 2, 3, 1).reshape(-1, len(down))


def examples(draw: Draw) -> Iterator[tuple[Any, ...]]:
    """A small image, whose sums are split."""
    last = torch.channels_last
    output, x, down = (
        draw(*shape).contiguous(memory_format=last) for shape in ((1, 48, 9, 8), (1, 80, 9, 8), (16, 80, 3, 3))
    )
    yield output, draw(48), x, down, draw(48, 16), ConvParams((1, 1), (1, 1), (1, 1)), 0.5


KERNEL = Kernel("unet", lora_conv, supports, reference, examples)


@triton.jit(do_not_specialize=["pixels", "chunks_per_split", *GEOMETRY_PARAMETERS])
def _partial_sums(  # type: ignore[no-untyped-def]
    x,
    down,
    sums,
    pixels,
    chunks_per_split,
    channels,
    height,
    width,
    out_height,
    out_width,
    taps,
    kernel_width,
    stride_y,
    stride_x,
    pad_y,
    pad_x,
    dilation_y,
    dilation_x,
    RANK: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One split of the sum over taps and channels, for a block of output pixels."""
    chunks = tl.cdiv(channels, CHANNELS)
    pixel, ranks = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS), tl.arange(0, PADDED_RANK)
    image, row, column = pixel_position(pixel, out_height, out_width)
    total = tl.zeros((PIXELS, PADDED_RANK), tl.float32)
    first = tl.program_id(1) * chunks_per_split
    for chunk in range(first, tl.minimum(first + chunks_per_split, chunks * taps)):
        tap, channel = chunk // chunks, chunk % chunks * CHANNELS + tl.arange(0, CHANNELS)
        values = load_at_tap(
            x,
            image,
            row,
            column,
            pixel < pixels,
            channel,
            tap,
            channels,
            height,
            width,
            kernel_width,
            stride_y,
            stride_x,
            pad_y,
            pad_x,
            dilation_y,
            dilation_x,
        )
        weights = load_tap_weights(down, tap, ranks, channel, channels, taps, RANK)
        total = tl.dot(values, tl.trans(weights), total)
    store_block(sums + tl.program_id(1).to(tl.int64) * pixels * RANK, pixel, ranks, RANK, pixels, RANK, total)


@triton.jit(do_not_specialize=["scale", "pixels", "splits", "has_bias"])
def _reduce_and_add(  # type: ignore[no-untyped-def]
    sums,
    x_down,
    up,
    bias,
    output,
    scale,
    pixels,
    splits,
    outputs,
    has_bias,
    RANK: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Add up the splits, and add b + s · x_down · upᵀ to a tile of the output."""
    pixel, ranks = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS), tl.arange(0, PADDED_RANK)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros((PIXELS, PADDED_RANK), tl.float32)
    for _ in range(0, splits):
        total += load_block(sums, pixel, ranks, RANK, pixels, RANK)
        sums += pixels * RANK
    h_rounded = total.to(x_down.dtype.element_ty)
    if tl.program_id(1) == 0:
        store_block(x_down, pixel, ranks, RANK, pixels, RANK, h_rounded)
    added = scale * tl.dot(h_rounded, tl.trans(load_block(up, channel, ranks, RANK, outputs, RANK)))
    added += tl.load(bias + channel, mask=(channel < outputs) & (has_bias > 0), other=0.0).to(tl.float32)[None, :]
    add_block(output, pixel, channel, outputs, pixels, outputs, added)
