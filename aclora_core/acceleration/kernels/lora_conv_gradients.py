"""Convolutions with LoRA branches: the branch's gradients, in one kernel.

The gradient of the weight of a convolution with 16 outputs takes the libraries several times as long as the
convolution. Here all that is independent shares a launch, and long sums are split. Sums are float32, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._conv_taps import (
    GEOMETRY_PARAMETERS,
    geometry_arguments,
    load_at_tap,
    pixel_position,
    shape_arguments,
    supports_images,
)
from ._tiles import accumulate_outer, add_block, load_block, padded_rank, plan_split_k, split_k_reduce
from ._triton import tl, triton
from .kernel import ConvParams, Draw, Kernel
from .launch import launch

_PIXELS, _CHANNELS = 64, 64  # of a tile
_BLOCK_K = 128  # pixels that a program sums over in one step
_INPUT_CHANNELS = 128  # of a tile of the input's gradient
_TAP_ELEMENTS = 64  # elements of several taps, all ranks of each, that are multiplied in one step
_MAX_PIXELS = 8192  # beyond which the libraries are faster, as they split long sums among more programs


def lora_conv_gradients(
    x: Tensor,
    grad_output: Tensor,
    x_down: Tensor,
    grad_up: Tensor,
    down: Tensor,
    down_grad: Tensor,
    up_grad: Tensor,
    grad_input: Tensor | None,
    params: ConvParams,
    scale: float,
) -> None:
    """Add the gradients of a branch's factors and, if wanted, of its input. All tensors are float16, or all bfloat16.

    Args:
        x: (n, in, h, w), channels last in memory as all tensors of four axes are.
        grad_output: g, (n, out, h', w').
        x_down: down * x as rows, (n · h' · w', rank), from lora_conv.
        grad_up: g · up as rows, (n · h' · w', rank).
        down: (rank, in, kh, kw).
        down_grad: (rank, in, kh, kw), to add to.
        up_grad: (out, rank), to add to: s · gᵀ x_down.
        grad_input: (n, in, h, w), to add to, or None.
        params: of the convolution.
        scale: s = alpha / rank.
    """
    (outputs, rank), inputs, pixels = up_grad.shape, x.shape[1], len(grad_up)
    up_blocks = triton.cdiv(outputs, _CHANNELS)
    sums = up_blocks + down[0, 0].numel() * triton.cdiv(inputs, _CHANNELS)
    split_k = plan_split_k(pixels, sums, _BLOCK_K, _CHANNELS * padded_rank(rank), x.device)
    in_pixels = x.numel() // inputs
    tiles = 0 if grad_input is None else triton.cdiv(in_pixels, _PIXELS) * triton.cdiv(inputs, _INPUT_CHANNELS)
    with torch.cuda.device_of(x):
        launch(
            _add_gradients,
            (sums * split_k.splits + tiles,),
            x,
            grad_output,
            x_down,
            grad_up,
            down,
            down_grad,
            up_grad,
            x if grad_input is None else grad_input,
            *split_k,
            scale,
            pixels,
            in_pixels,
            outputs,
            up_blocks,
            sums,
            *shape_arguments(x, grad_output),
            *geometry_arguments(down, params),
            rank,
            padded_rank(rank),
            _PIXELS,
            _CHANNELS,
            _BLOCK_K,
            _INPUT_CHANNELS,
            max(1, _TAP_ELEMENTS // padded_rank(rank)),
            num_stages=4,
        )


def supports(x: Tensor, grad_output: Tensor, down: Tensor) -> bool:
    """Half precision, channels in whole blocks, and no longer sums than pay off."""
    outputs = grad_output.shape[1]
    pixels = grad_output.numel() // max(1, outputs)
    return supports_images(x, outputs, len(down)) and pixels <= _MAX_PIXELS


def reference(
    x: Tensor,
    grad_output: Tensor,
    x_down: Tensor,
    grad_up: Tensor,
    down: Tensor,
    down_grad: Tensor,
    up_grad: Tensor,
    grad_input: Tensor | None,
    params: ConvParams,
    scale: float,
) -> None:
    """Do lora_conv_gradients in plain PyTorch."""
    n, outputs, *size = grad_output.shape
    up_grad.addmm_(grad_output.permute(0, 2, 3, 1).reshape(-1, outputs).t(), x_down, alpha=scale)
    grad_rank = scale * grad_up.view(n, *size, -1).permute(0, 3, 1, 2)  # (n, rank, h', w')
    wanted = (grad_input is not None, True, False)
    added_input, added_down, _ = torch.ops.aten.convolution_backward(
        grad_rank, x, down, None, *params, False, (0, 0), 1, wanted
    )
    down_grad += added_down
    if grad_input is not None:
        grad_input += added_input


def examples(draw: Draw) -> Iterator[tuple[Any, ...]]:
    """A small image, with the gradient of the input."""
    x, grad_output, down, down_grad, grad_input = (
        draw(*shape).contiguous(memory_format=torch.channels_last)
        for shape in ((1, 80, 9, 8), (1, 48, 9, 8), (16, 80, 3, 3), (16, 80, 3, 3), (1, 80, 9, 8))
    )
    params = ConvParams((1, 1), (1, 1), (1, 1))
    rows = draw(72, 16), draw(72, 16)
    yield x, grad_output, *rows, down, down_grad, draw(48, 16), grad_input, params, 0.5


KERNEL = Kernel("unet", lora_conv_gradients, supports, reference, examples)


@triton.jit(
    do_not_specialize=[
        "splits",
        "pixels_per_split",
        "scale",
        "pixels",
        "in_pixels",
        "up_blocks",
        "sums",
        *GEOMETRY_PARAMETERS,
    ]
)
def _add_gradients(  # type: ignore[no-untyped-def]
    x,
    grad_output,
    x_down,
    grad_up,
    down,
    down_grad,
    up_grad,
    grad_input,
    scratch,
    arrived,
    splits,
    pixels_per_split,
    scale,
    pixels,
    in_pixels,
    outputs,
    up_blocks,
    sums,
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
    BLOCK_K: tl.constexpr,
    INPUT_CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
):
    program = tl.program_id(0)
    if program < sums * splits:
        block, split, ranks = program % sums, program // sums, tl.arange(0, PADDED_RANK)
        begin, end = split * pixels_per_split, tl.minimum(split * pixels_per_split + pixels_per_split, pixels)
        if block < up_blocks:
            added = accumulate_outer(
                grad_output, x_down, begin, end, outputs, outputs, block, RANK, PADDED_RANK, CHANNELS, BLOCK_K
            )
            is_last, added = split_k_reduce(added, scratch, arrived, block, split, splits, CHANNELS, PADDED_RANK)
            if is_last:
                channel = block * CHANNELS + tl.arange(0, CHANNELS)
                add_block(up_grad, channel, ranks, RANK, outputs, RANK, scale * added)
        else:
            tap_blocks = tl.cdiv(channels, CHANNELS)
            tap = (block - up_blocks) // tap_blocks
            channel = (block - up_blocks) % tap_blocks * CHANNELS + tl.arange(0, CHANNELS)
            added = _accumulate_tap(
                x,
                grad_up,
                begin,
                end,
                tap,
                channel,
                channels,
                height,
                width,
                out_height,
                out_width,
                kernel_width,
                stride_y,
                stride_x,
                pad_y,
                pad_x,
                dilation_y,
                dilation_x,
                RANK,
                PADDED_RANK,
                CHANNELS,
                BLOCK_K,
            )
            is_last, added = split_k_reduce(added, scratch, arrived, block, split, splits, CHANNELS, PADDED_RANK)
            if is_last:
                add_block(
                    down_grad + tap * channels, ranks, channel, taps * channels, RANK, channels, scale * tl.trans(added)
                )
    else:
        _add_to_input(
            grad_input,
            grad_up,
            down,
            scale,
            in_pixels,
            program - sums * splits,
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
            RANK,
            PADDED_RANK,
            PIXELS,
            INPUT_CHANNELS,
            TAPS,
        )


@triton.jit
def _accumulate_tap(  # type: ignore[no-untyped-def]
    x,
    grad_up,
    begin,
    end,
    tap,
    channel,
    channels,
    height,
    width,
    out_height,
    out_width,
    kernel_width,
    stride_y,
    stride_x,
    pad_y,
    pad_x,
    dilation_y,
    dilation_x,
    RANK: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradient of one tap's weights from the pixels from begin to end, (channels, rank)."""
    ranks = tl.arange(0, PADDED_RANK)
    total = tl.zeros((CHANNELS, PADDED_RANK), tl.float32)
    for first in range(begin, end, BLOCK_K):
        pixel = first + tl.arange(0, BLOCK_K)
        image, row, column = pixel_position(pixel, out_height, out_width)
        values = load_at_tap(
            x,
            image,
            row,
            column,
            pixel < end,
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
        total = tl.dot(tl.trans(values), load_block(grad_up, pixel, ranks, RANK, end, RANK), total)
    return total


@triton.jit
def _add_to_input(  # type: ignore[no-untyped-def]
    grad_input,
    grad_up,
    down,
    scale,
    in_pixels,
    tile,
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
    TAPS: tl.constexpr,
):
    """Add a tile of the input's gradient, (pixels, channels): a transposed convolution, several taps at once."""
    tile_columns = tl.cdiv(channels, CHANNELS)
    pixel, ranks = tile // tile_columns * PIXELS + tl.arange(0, PIXELS), tl.arange(0, PADDED_RANK)
    channel = tile % tile_columns * CHANNELS + tl.arange(0, CHANNELS)
    image, row, column = pixel_position(pixel, height, width)
    lanes = tl.arange(0, TAPS * PADDED_RANK)
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for first in tl.range(0, taps, TAPS, num_stages=1):  # one stage: shared memory holds no second tile
        tap = first + tl.arange(0, TAPS)
        y_out = row[:, None] + pad_y - (tap // kernel_width * dilation_y)[None, :]
        x_out = column[:, None] + pad_x - (tap % kernel_width * dilation_x)[None, :]
        mask = ((pixel < in_pixels)[:, None] & (tap < taps)[None, :]) & (y_out >= 0) & (x_out >= 0)
        on_stride = (y_out % stride_y == 0) & (x_out % stride_x == 0)
        mask &= on_stride & (y_out // stride_y < out_height) & (x_out // stride_x < out_width)
        offset = ((image[:, None] * out_height + y_out // stride_y) * out_width + x_out // stride_x).to(tl.int64) * RANK
        rows = grad_up + offset[:, :, None] + ranks[None, None, :]
        h = tl.load(rows, mask=mask[:, :, None] & (ranks < RANK)[None, None, :], other=0.0)
        tap, rank = first + lanes // PADDED_RANK, lanes % PADDED_RANK
        inside = ((tap < taps) & (rank < RANK))[:, None] & (channel < channels)[None, :]
        weights = tl.load(down + (rank * taps + tap)[:, None] * channels + channel[None, :], mask=inside, other=0.0)
        total = tl.dot(tl.reshape(h, (PIXELS, TAPS * PADDED_RANK)), weights, total)
    add_block(grad_input, pixel, channel, channels, in_pixels, channels, scale * total)
