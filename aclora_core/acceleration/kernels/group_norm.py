"""Group normalisation of channels-last images, with an optional shift before it and SiLU after it.

PyTorch's kernel wants the channels first, so each call between two convolutions converts the images back and forth. It
also works on one group at a time, which leaves most of a large GPU idle at small batches. Here a program takes a tile
of pixels and channels, whatever their groups: one kernel sums each tile, a second adds up the tiles of a group, and a
third applies the result. All sums are made in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import tl, triton
from .kernel import Draw, Kernel
from .launch import launch

_PIXELS, _CHANNELS = 64, 64  # of a tile
_BLOCK, _WARPS = 2048, 8  # sums of tiles that are added up at once, and by how many warps


def group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool = False, shift: Tensor | None = None
) -> Tensor:
    """Compute z = (y - mean) · rstd · weight + bias by groups of channels, y = x + shift; z · sigmoid(z) if silu.

    Args:
        x: (n, c, h, w), channels last in memory, float32, float16 or bfloat16. Computed in float32 within.
        groups: the number of groups that the channels are divided into.
        weight: (c,) of any dtype; frozen: it gets no gradient.
        bias: like weight.
        eps: added to the variance.
        silu: whether SiLU follows.
        shift: (n, c) of x's dtype, added to every pixel; None for no shift.

    Returns:
        x's shape, dtype and memory format.
    """
    return _GroupNorm.apply(x, shift, groups, weight, bias, eps, silu)


def supports(x: Tensor) -> bool:
    """Images whose channels come last in memory; PyTorch serves the others."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def reference(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool = False, shift: Tensor | None = None
) -> Tensor:
    """Compute group_norm in plain PyTorch."""
    if shift is not None:
        x = (x.float() + shift.float()[:, :, None, None]).to(x.dtype)
    normed = F.group_norm(x, groups, weight, bias, eps).contiguous(memory_format=torch.channels_last)
    return F.silu(normed) if silu else normed


def examples(draw: Draw) -> Iterator[tuple[Any, ...]]:
    """Two images, alone, with SiLU, and with a shift."""
    x = draw(2, 320, 9, 10).contiguous(memory_format=torch.channels_last).requires_grad_()
    norm = 32, draw(320), draw(320), 1e-5
    yield x, *norm
    yield x, *norm, True
    yield x, *norm, True, draw(2, 320).requires_grad_()


KERNEL = Kernel("unet", group_norm, supports, reference, examples)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor | None, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool
    ) -> Tensor:
        shifted, shift = shift is not None, x if shift is None else shift.contiguous()
        n, channels, pixels, group_channels, grid = _sizes(x, groups)
        sums, squares = _tile_buffers(x, grid)
        mean, rstd = _image_buffers(x)
        output = torch.empty_like(x)
        with torch.cuda.device_of(x):
            launch(_tile_moments, grid, x, shift, sums, squares, pixels, channels, shifted, _PIXELS, _CHANNELS)
            launch(
                _group_moments,
                (groups, n),
                sums,
                squares,
                mean,
                rstd,
                grid[1],
                pixels,
                channels,
                group_channels,
                eps,
                _PIXELS,
                _BLOCK,
                num_warps=_WARPS,
            )
            launch(
                _apply,
                grid,
                x,
                shift,
                output,
                mean,
                rstd,
                weight,
                bias,
                pixels,
                channels,
                shifted,
                silu,
                _PIXELS,
                _CHANNELS,
            )
        ctx.save_for_backward(x, shift, weight, bias, mean, rstd)
        ctx.groups, ctx.silu, ctx.shifted = groups, silu, shifted
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, weight, bias, mean, rstd = ctx.saved_tensors
        n, channels, pixels, group_channels, grid = _sizes(x, ctx.groups)
        grad_output = grad_output.contiguous(memory_format=torch.channels_last)
        sums, products = _tile_buffers(x, grid)
        mean_grad, mean_product = _image_buffers(x)
        grad_input = torch.empty_like(x)
        grad_shift = torch.empty_like(shift) if ctx.shifted else None
        tensors = x, shift, grad_output, mean, rstd, weight, bias
        sizes = pixels, channels, ctx.shifted, ctx.silu, _PIXELS, _CHANNELS
        with torch.cuda.device_of(x):
            launch(_tile_gradients, grid, *tensors, sums, products, *sizes)
            launch(
                _group_gradients,
                (ctx.groups, n),
                sums,
                products,
                mean_grad,
                mean_product,
                grid[1],
                pixels,
                channels,
                group_channels,
                _BLOCK,
                num_warps=_WARPS,
            )
            launch(_apply_gradients, grid, *tensors, mean_grad, mean_product, grad_input, sums, *sizes)
            if grad_shift is not None:
                launch(_add_tiles, (grid[0], n), sums, grad_shift, grid[1], channels, _CHANNELS)
        return grad_input, grad_shift, None, None, None, None, None


def _sizes(x: Tensor, groups: int) -> tuple[int, int, int, int, tuple[int, int, int]]:
    """Images, channels, pixels, channels of a group; the grid: tiles of channels, tiles of pixels, images."""
    n, channels, height, width = x.shape
    pixels = height * width
    return n, channels, pixels, channels // groups, (triton.cdiv(channels, _CHANNELS), triton.cdiv(pixels, _PIXELS), n)


def _tile_buffers(x: Tensor, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Two buffers for a number of each channel of each tile of pixels."""
    shape = len(x), grid[1], x.shape[1]
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


def _image_buffers(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two buffers for a number of each channel of each image."""
    return x.new_empty(x.shape[:2], dtype=torch.float32), x.new_empty(x.shape[:2], dtype=torch.float32)


@triton.jit
def _tile(pixels, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Offset of a program's first pixel; from there the offsets of its tile; the tile's mask; its channels."""
    first = tl.program_id(1) * PIXELS
    start = (tl.program_id(2).to(tl.int64) * pixels + first) * channels
    pixel = tl.arange(0, PIXELS)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mask = (first + pixel < pixels)[:, None] & (channel < channels)[None, :]
    return start, pixel[:, None] * channels + channel[None, :], mask, channel


@triton.jit
def _store_tile_sums(first, second, first_sum, second_sum, channel, channels):  # type: ignore[no-untyped-def]
    """Store a program's sums of its channels in two buffers."""
    offset = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * channels + channel
    tl.store(first + offset, first_sum, mask=channel < channels)
    tl.store(second + offset, second_sum, mask=channel < channels)


@triton.jit
def _store_for_group(buffer, value, channels, group_channels, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store a number of a program's group for each of its channels, so that it is read without a division."""
    first = tl.program_id(1) * channels + tl.program_id(0) * group_channels
    begin = 0
    while begin < group_channels:
        channel = begin + tl.arange(0, BLOCK)
        tl.store(buffer + first + channel, value, mask=channel < group_channels)
        begin += BLOCK


@triton.jit
def _load_for_image(buffer, channel, channels):  # type: ignore[no-untyped-def]
    """Load the numbers of a program's channels in its image, (1, channels)."""
    return _load_channels(buffer + tl.program_id(2) * channels, channel, channels)


@triton.jit
def _load_channels(vector, channel, channels):  # type: ignore[no-untyped-def]
    return tl.load(vector + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _load_shifted(x, shift, start, offset, mask, channel, channels, SHIFTED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load a tile of y = x + shift, zero outside."""
    values = tl.load(x + start + offset, mask=mask, other=0.0).to(tl.float32)
    if SHIFTED:
        values = tl.where(mask, values + _load_for_image(shift, channel, channels), 0.0)
    return values


@triton.jit(do_not_specialize=["pixels"])
def _tile_moments(  # type: ignore[no-untyped-def]
    x,
    shift,
    sums,
    squares,
    pixels,
    channels,
    SHIFTED: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The sum of each channel of a tile, and the sum of squared differences from the channel's own mean."""
    start, offset, mask, channel = _tile(pixels, channels, PIXELS, CHANNELS)
    values = _load_shifted(x, shift, start, offset, mask, channel, channels, SHIFTED)
    total = tl.sum(values, 0)
    count = tl.minimum(pixels - tl.program_id(1) * PIXELS, PIXELS).to(tl.float32)
    centered = tl.where(mask, values - (total / count)[None, :], 0.0)
    _store_tile_sums(sums, squares, total, tl.sum(centered * centered, 0), channel, channels)


@triton.jit
def _group_block(begin, tiles, channels, group_channels, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Some of the tile sums of a program's group: their offsets, their mask, and the tile of pixels of each."""
    index = begin + tl.arange(0, BLOCK)
    tile = index // group_channels
    offset = (tl.program_id(1) * tiles + tile) * channels + tl.program_id(0) * group_channels + index % group_channels
    return offset, tile < tiles, tile


@triton.jit(do_not_specialize=["tiles", "pixels", "group_channels", "eps"])
def _group_moments(  # type: ignore[no-untyped-def]
    sums,
    squares,
    means,
    rstds,
    tiles,
    pixels,
    channels,
    group_channels,
    eps,
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean and rstd of a group from the moments of its tiles (Chan, Golub, LeVeque 1979)."""
    total = tl.zeros((BLOCK,), tl.float32)
    begin = 0
    while begin < tiles * group_channels:
        offset, mask, tile = _group_block(begin, tiles, channels, group_channels, BLOCK)
        total += tl.load(sums + offset, mask=mask, other=0.0)
        begin += BLOCK
    size = (pixels * group_channels).to(tl.float32)
    mean = tl.sum(total, 0) / size
    square = tl.zeros((BLOCK,), tl.float32)
    begin = 0
    while begin < tiles * group_channels:
        offset, mask, tile = _group_block(begin, tiles, channels, group_channels, BLOCK)
        count = tl.minimum(tl.maximum(pixels - tile * PIXELS, 1), PIXELS).to(tl.float32)
        centered = tl.load(sums + offset, mask=mask, other=0.0) / count - mean
        square += tl.where(mask, tl.load(squares + offset, mask=mask, other=0.0) + count * centered * centered, 0.0)
        begin += BLOCK
    _store_for_group(means, mean, channels, group_channels, BLOCK)
    _store_for_group(rstds, tl.rsqrt(tl.sum(square, 0) / size + eps), channels, group_channels, BLOCK)


@triton.jit(do_not_specialize=["pixels"])
def _apply(  # type: ignore[no-untyped-def]
    x,
    shift,
    output,
    means,
    rstds,
    weight,
    bias,
    pixels,
    channels,
    SHIFTED: tl.constexpr,
    SILU: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    start, offset, mask, channel = _tile(pixels, channels, PIXELS, CHANNELS)
    values = _load_shifted(x, shift, start, offset, mask, channel, channels, SHIFTED)
    normed = (values - _load_for_image(means, channel, channels)) * _load_for_image(rstds, channel, channels)
    result = normed * _load_channels(weight, channel, channels) + _load_channels(bias, channel, channels)
    if SILU:
        result = result * tl.sigmoid(result)
    tl.store(output + start + offset, result, mask=mask)


@triton.jit
def _normed_and_gradient(  # type: ignore[no-untyped-def]
    x,
    shift,
    grad_output,
    means,
    rstds,
    weight,
    bias,
    pixels,
    channels,
    SHIFTED: tl.constexpr,
    SILU: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A tile of y_hat = (y - mean) · rstd, before weight and bias, and of its gradient."""
    start, offset, mask, channel = _tile(pixels, channels, PIXELS, CHANNELS)
    values = _load_shifted(x, shift, start, offset, mask, channel, channels, SHIFTED)
    grad = tl.load(grad_output + start + offset, mask=mask, other=0.0).to(tl.float32)
    normed = (values - _load_for_image(means, channel, channels)) * _load_for_image(rstds, channel, channels)
    weights = _load_channels(weight, channel, channels)
    if SILU:
        z = normed * weights + _load_channels(bias, channel, channels)
        sigmoid = tl.sigmoid(z)
        grad *= sigmoid * (1 + z * (1 - sigmoid))
    return normed, grad * weights


@triton.jit(do_not_specialize=["pixels"])
def _tile_gradients(  # type: ignore[no-untyped-def]
    x,
    shift,
    grad_output,
    means,
    rstds,
    weight,
    bias,
    sums,
    products,
    pixels,
    channels,
    SHIFTED: tl.constexpr,
    SILU: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """For each channel of a tile the sum of its gradients, and of their products with y_hat."""
    normed, grad = _normed_and_gradient(
        x, shift, grad_output, means, rstds, weight, bias, pixels, channels, SHIFTED, SILU, PIXELS, CHANNELS
    )
    start, offset, mask, channel = _tile(pixels, channels, PIXELS, CHANNELS)
    _store_tile_sums(sums, products, tl.sum(grad, 0), tl.sum(grad * normed, 0), channel, channels)


@triton.jit(do_not_specialize=["tiles", "pixels", "group_channels"])
def _group_gradients(  # type: ignore[no-untyped-def]
    sums, products, mean_grads, mean_products, tiles, pixels, channels, group_channels, BLOCK: tl.constexpr
):
    """A group's mean gradient, and the mean of its products with y_hat."""
    total, total_product = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    begin = 0
    while begin < tiles * group_channels:
        offset, mask, tile = _group_block(begin, tiles, channels, group_channels, BLOCK)
        total += tl.load(sums + offset, mask=mask, other=0.0)
        total_product += tl.load(products + offset, mask=mask, other=0.0)
        begin += BLOCK
    size = (pixels * group_channels).to(tl.float32)
    _store_for_group(mean_grads, tl.sum(total, 0) / size, channels, group_channels, BLOCK)
    _store_for_group(mean_products, tl.sum(total_product, 0) / size, channels, group_channels, BLOCK)


@triton.jit(do_not_specialize=["pixels"])
def _apply_gradients(  # type: ignore[no-untyped-def]
    x,
    shift,
    grad_output,
    means,
    rstds,
    weight,
    bias,
    mean_grads,
    mean_products,
    grad_input,
    sums,
    pixels,
    channels,
    SHIFTED: tl.constexpr,
    SILU: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """rstd · (g - mean(g) - y_hat · mean(g · y_hat)), g the gradient of y_hat; and the sum of it over each tile."""
    normed, grad = _normed_and_gradient(
        x, shift, grad_output, means, rstds, weight, bias, pixels, channels, SHIFTED, SILU, PIXELS, CHANNELS
    )
    start, offset, mask, channel = _tile(pixels, channels, PIXELS, CHANNELS)
    grad -= _load_for_image(mean_grads, channel, channels) + normed * _load_for_image(mean_products, channel, channels)
    result = grad * _load_for_image(rstds, channel, channels)
    tl.store(grad_input + start + offset, result, mask=mask)
    if SHIFTED:
        at = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * channels + channel
        tl.store(sums + at, tl.sum(tl.where(mask, result, 0.0), 0), mask=channel < channels)


@triton.jit(do_not_specialize=["tiles"])
def _add_tiles(sums, grad_shift, tiles, channels, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add up the tiles of an image, for some of its channels."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    sums += tl.program_id(1) * tiles * channels + channel
    total = tl.zeros((CHANNELS,), tl.float32)
    for _ in range(0, tiles):
        total += tl.load(sums, mask=channel < channels, other=0.0)
        sums += channels
    tl.store(grad_shift + tl.program_id(1) * channels + channel, total, mask=channel < channels)
