"""Group normalisation of pictures whose channels come last in memory. Importing this file needs Triton.

PyTorch's kernel wants the channels first, so every call between two convolutions turns the picture around and back. It
also works on one group at a time, which leaves most of a large GPU idle at small batches. Here a program takes a tile
of pixels and channels, whatever their groups: one kernel sums up the tiles, a second joins those of a group, a third
applies the result. All sums are made in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from .launch import launch

_PIXELS, _CHANNELS = 64, 64  # of a tile
_JOINED, _WARPS = 2048, 8  # sums that are joined at once, and by how many warps


def group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool = False, shift: Tensor | None = None
) -> Tensor:
    """(y - mean) / √(variance + eps) · weight + bias, by groups of channels; then z · sigmoid(z) if silu.

    x: (n, c, h, w), channels last in memory; float32, float16 or bfloat16 on a CUDA device -> the same. y is x, or
    x + shift, (n, c) of the same type, where it is given. weight, bias: (c,), of any type; frozen: they get no
    gradient. Computed in float32 within.
    """
    return _GroupNorm.apply(x, shift, groups, weight, bias, eps, silu)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor | None, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool
    ) -> Tensor:
        shifted, shift = shift is not None, x if shift is None else shift.contiguous()
        n, channels, pixels, each, tiles = _sizes(x, groups)
        sums, spreads = _sums(x, tiles)
        mean, slope = _results(x)
        output = torch.empty_like(x)
        with torch.cuda.device_of(x):
            launch(_sum_tiles, tiles, x, shift, sums, spreads, pixels, channels, shifted, _PIXELS, _CHANNELS)
            launch(
                _join_moments,
                (groups, n),
                sums,
                spreads,
                mean,
                slope,
                tiles[1],
                pixels,
                channels,
                each,
                eps,
                _PIXELS,
                _JOINED,
                num_warps=_WARPS,
            )
            launch(
                _apply,
                tiles,
                x,
                shift,
                output,
                mean,
                slope,
                weight,
                bias,
                pixels,
                channels,
                shifted,
                silu,
                _PIXELS,
                _CHANNELS,
            )
        ctx.save_for_backward(x, shift, weight, bias, mean, slope)
        ctx.groups, ctx.silu, ctx.shifted = groups, silu, shifted
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, weight, bias, mean, slope = ctx.saved_tensors
        n, channels, pixels, each, tiles = _sizes(x, ctx.groups)
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        sums, products = _sums(x, tiles)
        sum_, product = _results(x)
        of_input = torch.empty_like(x)
        of_shift = torch.empty_like(shift) if ctx.shifted else None
        given = x, shift, gradient, mean, slope, weight, bias
        sizes = pixels, channels, ctx.shifted, ctx.silu, _PIXELS, _CHANNELS
        with torch.cuda.device_of(x):
            launch(_sum_gradients, tiles, *given, sums, products, *sizes)
            launch(
                _join_gradients,
                (ctx.groups, n),
                sums,
                products,
                sum_,
                product,
                tiles[1],
                pixels,
                channels,
                each,
                _JOINED,
                num_warps=_WARPS,
            )
            launch(_apply_gradients, tiles, *given, sum_, product, of_input, sums, *sizes)
            if of_shift is not None:
                launch(_add_tiles, (tiles[0], n), sums, of_shift, tiles[1], channels, _CHANNELS)
        return of_input, of_shift, None, None, None, None, None


def _sizes(x: Tensor, groups: int) -> tuple[int, int, int, int, tuple[int, int, int]]:
    """Pictures, channels, pixels, channels of a group; tiles of channels, of pixels, and pictures."""
    n, channels, height, width = x.shape
    pixels = height * width
    return n, channels, pixels, channels // groups, (triton.cdiv(channels, _CHANNELS), triton.cdiv(pixels, _PIXELS), n)


def _sums(x: Tensor, tiles: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Room for two numbers for every channel of every tile."""
    shape = len(x), tiles[1], x.shape[1]
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


def _results(x: Tensor) -> tuple[Tensor, Tensor]:
    """Room for two numbers for every channel of every picture."""
    return x.new_empty(x.shape[:2], dtype=torch.float32), x.new_empty(x.shape[:2], dtype=torch.float32)


@triton.jit
def _tile(pixels, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where a program's pixels begin; from there the offsets of its tile, and what is inside; its channels."""
    first = tl.program_id(1) * PIXELS
    start = (tl.program_id(2).to(tl.int64) * pixels + first) * channels
    pixel = tl.arange(0, PIXELS)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (first + pixel < pixels)[:, None] & (channel < channels)[None, :]
    return start, pixel[:, None] * channels + channel[None, :], inside, channel


@triton.jit
def _store_sums(first, second, of_first, of_second, channel, channels):  # type: ignore[no-untyped-def]
    """Stores what a program has summed up for its channels."""
    at = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * channels + channel
    tl.store(first + at, of_first, mask=channel < channels)
    tl.store(second + at, of_second, mask=channel < channels)


@triton.jit
def _store_result(numbers, value, channels, each, JOINED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Stores what a program has found for its group, for every channel of it: so it is read without a division."""
    first = tl.program_id(1) * channels + tl.program_id(0) * each
    begin = 0
    while begin < each:
        channel = begin + tl.arange(0, JOINED)
        tl.store(numbers + first + channel, value, mask=channel < each)
        begin += JOINED


@triton.jit
def _of_channel(numbers, channel, channels):  # type: ignore[no-untyped-def]
    """The numbers of a program's channels in its picture, (1, channels)."""
    return _vector(numbers + tl.program_id(2) * channels, channel, channels)


@triton.jit
def _vector(numbers, channel, channels):  # type: ignore[no-untyped-def]
    return tl.load(numbers + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _values(x, shift, start, offset, inside, channel, channels, SHIFTED: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of what is normed, zero outside."""
    values = tl.load(x + start + offset, mask=inside, other=0.0).to(tl.float32)
    if SHIFTED:
        values = tl.where(inside, values + _of_channel(shift, channel, channels), 0.0)
    return values


@triton.jit(do_not_specialize=["pixels"])
def _sum_tiles(  # type: ignore[no-untyped-def]
    x,
    shift,
    sums,
    spreads,
    pixels,
    channels,
    SHIFTED: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """For each channel of a tile its sum, and the sum of the squares around its own mean."""
    start, offset, inside, channel = _tile(pixels, channels, PIXELS, CHANNELS)
    values = _values(x, shift, start, offset, inside, channel, channels, SHIFTED)
    total = tl.sum(values, 0)
    count = tl.minimum(pixels - tl.program_id(1) * PIXELS, PIXELS).to(tl.float32)
    away = tl.where(inside, values - (total / count)[None, :], 0.0)
    _store_sums(sums, spreads, total, tl.sum(away * away, 0), channel, channels)


@triton.jit
def _part(begin, parts, channels, each, JOINED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Some of the sums of a program's group: their offsets, what is inside, and which tile of pixels they are from."""
    index = begin + tl.arange(0, JOINED)
    part = index // each
    at = (tl.program_id(1) * parts + part) * channels + tl.program_id(0) * each + index % each
    return at, part < parts, part


@triton.jit(do_not_specialize=["parts", "pixels", "each", "eps"])
def _join_moments(  # type: ignore[no-untyped-def]
    sums, spreads, mean, slope, parts, pixels, channels, each, eps, PIXELS: tl.constexpr, JOINED: tl.constexpr
):
    """Mean and 1 / √(variance + eps) of a group, from its tiles (Chan, Golub, LeVeque 1979)."""
    total = tl.zeros((JOINED,), tl.float32)
    begin = 0
    while begin < parts * each:
        at, inside, part = _part(begin, parts, channels, each, JOINED)
        total += tl.load(sums + at, mask=inside, other=0.0)
        begin += JOINED
    size = (pixels * each).to(tl.float32)
    middle = tl.sum(total, 0) / size
    spread = tl.zeros((JOINED,), tl.float32)
    begin = 0
    while begin < parts * each:
        at, inside, part = _part(begin, parts, channels, each, JOINED)
        count = tl.minimum(tl.maximum(pixels - part * PIXELS, 1), PIXELS).to(tl.float32)
        away = tl.load(sums + at, mask=inside, other=0.0) / count - middle
        spread += tl.where(inside, tl.load(spreads + at, mask=inside, other=0.0) + count * away * away, 0.0)
        begin += JOINED
    _store_result(mean, middle, channels, each, JOINED)
    _store_result(slope, tl.rsqrt(tl.sum(spread, 0) / size + eps), channels, each, JOINED)


@triton.jit(do_not_specialize=["pixels"])
def _apply(  # type: ignore[no-untyped-def]
    x,
    shift,
    output,
    mean,
    slope,
    weight,
    bias,
    pixels,
    channels,
    SHIFTED: tl.constexpr,
    SILU: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    start, offset, inside, channel = _tile(pixels, channels, PIXELS, CHANNELS)
    values = _values(x, shift, start, offset, inside, channel, channels, SHIFTED)
    normed = (values - _of_channel(mean, channel, channels)) * _of_channel(slope, channel, channels)
    result = normed * _vector(weight, channel, channels) + _vector(bias, channel, channels)
    if SILU:
        result = result * tl.sigmoid(result)
    tl.store(output + start + offset, result, mask=inside)


@triton.jit
def _gradients(  # type: ignore[no-untyped-def]
    x,
    shift,
    gradient,
    mean,
    slope,
    weight,
    bias,
    pixels,
    channels,
    SHIFTED: tl.constexpr,
    SILU: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A tile of the normed picture, before weight and bias, and of its gradient."""
    start, offset, inside, channel = _tile(pixels, channels, PIXELS, CHANNELS)
    values = _values(x, shift, start, offset, inside, channel, channels, SHIFTED)
    arriving = tl.load(gradient + start + offset, mask=inside, other=0.0).to(tl.float32)
    normed = (values - _of_channel(mean, channel, channels)) * _of_channel(slope, channel, channels)
    weights = _vector(weight, channel, channels)
    if SILU:
        before = normed * weights + _vector(bias, channel, channels)
        share = tl.sigmoid(before)
        arriving *= share * (1 + before * (1 - share))
    return normed, arriving * weights


@triton.jit(do_not_specialize=["pixels"])
def _sum_gradients(  # type: ignore[no-untyped-def]
    x,
    shift,
    gradient,
    mean,
    slope,
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
    """For each channel of a tile the sum of its gradients, and of their products with the normed picture."""
    normed, arriving = _gradients(
        x, shift, gradient, mean, slope, weight, bias, pixels, channels, SHIFTED, SILU, PIXELS, CHANNELS
    )
    start, offset, inside, channel = _tile(pixels, channels, PIXELS, CHANNELS)
    _store_sums(sums, products, tl.sum(arriving, 0), tl.sum(arriving * normed, 0), channel, channels)


@triton.jit(do_not_specialize=["parts", "pixels", "each"])
def _join_gradients(sums, products, sum_, product, parts, pixels, channels, each, JOINED: tl.constexpr):  # type: ignore[no-untyped-def]
    """A group's means of both."""
    total, together = tl.zeros((JOINED,), tl.float32), tl.zeros((JOINED,), tl.float32)
    begin = 0
    while begin < parts * each:
        at, inside, part = _part(begin, parts, channels, each, JOINED)
        total += tl.load(sums + at, mask=inside, other=0.0)
        together += tl.load(products + at, mask=inside, other=0.0)
        begin += JOINED
    size = (pixels * each).to(tl.float32)
    _store_result(sum_, tl.sum(total, 0) / size, channels, each, JOINED)
    _store_result(product, tl.sum(together, 0) / size, channels, each, JOINED)


@triton.jit(do_not_specialize=["pixels"])
def _apply_gradients(  # type: ignore[no-untyped-def]
    x,
    shift,
    gradient,
    mean,
    slope,
    weight,
    bias,
    sum_,
    product,
    of_input,
    sums,
    pixels,
    channels,
    SHIFTED: tl.constexpr,
    SILU: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """slope · (gradient - its mean - normed · the mean of their product), and what a tile of it sums up to."""
    normed, arriving = _gradients(
        x, shift, gradient, mean, slope, weight, bias, pixels, channels, SHIFTED, SILU, PIXELS, CHANNELS
    )
    start, offset, inside, channel = _tile(pixels, channels, PIXELS, CHANNELS)
    arriving -= _of_channel(sum_, channel, channels) + normed * _of_channel(product, channel, channels)
    result = arriving * _of_channel(slope, channel, channels)
    tl.store(of_input + start + offset, result, mask=inside)
    if SHIFTED:
        at = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * channels + channel
        tl.store(sums + at, tl.sum(tl.where(inside, result, 0.0), 0), mask=channel < channels)


@triton.jit(do_not_specialize=["parts"])
def _add_tiles(sums, of_shift, parts, channels, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """What the tiles of a picture sum up to, for some of its channels."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    sums += tl.program_id(1) * parts * channels + channel
    total = tl.zeros((CHANNELS,), tl.float32)
    for _ in range(0, parts):
        total += tl.load(sums, mask=channel < channels, other=0.0)
        sums += channels
    tl.store(of_shift + tl.program_id(1) * channels + channel, total, mask=channel < channels)
