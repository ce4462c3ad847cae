"""The LoRA branch of a convolution: two kernels forwards, and one on the way back. Importing this file needs Triton.

To the libraries, a convolution with 16 outputs is one like any other: it takes them as long as one with 64, and the
gradient of its weight several times that. Here forwards the sum over inputs and taps is shared out, so that a small
picture fills a GPU too, and on the way back all that needs nothing of each other shares a launch. Sums are float32, and
made in a fixed order.

Pictures are channels last in memory, and written here as rows: one for each pixel of each picture.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from . import ConvParams
from ._tiles import add, block, joined, padded, share_out, store, summed
from .launch import launch

_PIXELS, _CHANNELS = 64, 64  # of a tile
_PROGRAMS, _MOST_PARTS = 264, 16  # that a sum is shared out to, and for one tile of pixels
_SUMMED = 128  # pixels that the gradients of the factors are summed up from at a time
_ADDED = 128  # channels of a tile of the output's sums
_GIVEN = 128  # channels of a tile of what the input gets
_ABREAST = 64  # numbers of several taps, all ranks of each, that are multiplied and added at once
_PLAIN = (  # numbers that are not worth a compilation of their own when they are 1 or a multiple of 16
    "height",
    "width",
    "high",
    "wide",
    "taps",
    "abreast",
    "stride_y",
    "stride_x",
    "pad_y",
    "pad_x",
    "step_y",
    "step_x",
)


def add_branch(
    output: Tensor, bias: Tensor | None, x: Tensor, down: Tensor, up: Tensor, steps: ConvParams, scale: float
) -> Tensor:
    """Adds b + s · up(down * x) to output, and gives down * x as rows (pixels of output, rank).

    output: (n, out, h', w'); x: (n, in, h, w); down: (rank, in, kernel...), all of them channels last in memory; bias:
    (out,); up: (out, rank), contiguous. All are float16 or all bfloat16.
    """
    (outputs, rank), pixels = up.shape, output.numel() // output.shape[1]
    blocks, chunks = triton.cdiv(pixels, _PIXELS), triton.cdiv(x.shape[1], _CHANNELS) * down[0, 0].numel()
    each = triton.cdiv(chunks, max(1, min(_MOST_PARTS, _PROGRAMS // blocks)))
    parts = triton.cdiv(chunks, each)
    sums = x.new_empty(parts, pixels, rank, dtype=torch.float32)
    inner = x.new_empty(pixels, rank)
    with torch.cuda.device_of(x):
        launch(
            _convolve,
            (blocks, parts),
            x,
            down,
            sums,
            pixels,
            each,
            *_shape(x, output),
            *_geometry(down, steps),
            rank,
            padded(rank),
            _PIXELS,
            _CHANNELS,
        )
        launch(
            _add_up,
            (blocks, triton.cdiv(outputs, _ADDED)),
            sums,
            inner,
            up,
            up if bias is None else bias,
            output,
            scale,
            pixels,
            parts,
            outputs,
            int(bias is not None),
            rank,
            padded(rank),
            _PIXELS,
            _ADDED,
        )
    return inner


def add_gradients(
    x: Tensor,
    gradient: Tensor,
    inner: Tensor,
    through: Tensor,
    down: Tensor,
    of_down: Tensor,
    of_up: Tensor,
    of_input: Tensor | None,
    steps: ConvParams,
    scale: float,
) -> None:
    """Adds s · gᵀ inner to of_up (out, rank), and what of_down (rank, in, kernel...) and of_input get.

    gradient: (n, out, h', w') and x channels last in memory, as down, of_down and of_input are. inner = down * x and
    through = g · up: rows (pixels of the output, rank). of_input may be None.
    """
    (outputs, rank), inputs, pixels = of_up.shape, x.shape[1], len(through)
    ups, across = triton.cdiv(outputs, _CHANNELS), triton.cdiv(inputs, _CHANNELS)
    sums = ups + down[0, 0].numel() * across
    shares = share_out(pixels, sums, _SUMMED, _CHANNELS * padded(rank), x.device)
    source = x.numel() // inputs
    tiles = 0 if of_input is None else triton.cdiv(source, _PIXELS) * triton.cdiv(inputs, _GIVEN)
    with torch.cuda.device_of(x):
        launch(
            _add_gradients,
            (sums * shares.parts + tiles,),
            x,
            gradient,
            inner,
            through,
            down,
            of_down,
            of_up,
            x if of_input is None else of_input,
            *shares,
            scale,
            pixels,
            source,
            outputs,
            ups,
            sums,
            *_shape(x, gradient),
            *_geometry(down, steps),
            rank,
            padded(rank),
            _PIXELS,
            _CHANNELS,
            _SUMMED,
            _GIVEN,
            max(1, _ABREAST // padded(rank)),
            num_stages=4,
        )


def _shape(x: Tensor, output: Tensor) -> tuple[int, ...]:
    """Channels, height and width of the input; height and width of the output."""
    return *x.shape[1:], *output.shape[2:]


def _geometry(down: Tensor, steps: ConvParams) -> tuple[int, ...]:
    """How many taps there are and how many lie abreast, and each of the steps."""
    return down[0, 0].numel(), down.shape[3], *steps.stride, *steps.padding, *steps.dilation


@triton.jit
def _pixel(number, height, width):  # type: ignore[no-untyped-def]
    """Picture, line and column of a pixel."""
    return number // (height * width), number // width % height, number % width


@triton.jit
def _at_tap(  # type: ignore[no-untyped-def]
    x,
    picture,
    line,
    column,
    inside,
    channel,
    tap,
    channels,
    height,
    width,
    abreast,
    stride_y,
    stride_x,
    pad_y,
    pad_x,
    step_y,
    step_x,
):
    """What a tap of the kernel sees of the input for some pixels of the output; zero beyond the edges."""
    y, z = line * stride_y - pad_y + tap // abreast * step_y, column * stride_x - pad_x + tap % abreast * step_x
    seen = inside & (y >= 0) & (y < height) & (z >= 0) & (z < width)
    at = ((picture.to(tl.int64) * height + y) * width + z) * channels
    return tl.load(x + at[:, None] + channel[None, :], mask=seen[:, None] & (channel < channels)[None, :], other=0.0)


@triton.jit
def _of_tap(down, tap, ranks, channel, channels, taps, RANK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The weights of one tap, (rank, channels)."""
    at = (ranks * taps + tap)[:, None] * channels + channel[None, :]
    return tl.load(down + at, mask=(ranks < RANK)[:, None] & (channel < channels)[None, :], other=0.0)


@triton.jit(do_not_specialize=["pixels", "each", *_PLAIN])
def _convolve(  # type: ignore[no-untyped-def]
    x,
    down,
    sums,
    pixels,
    each,
    channels,
    height,
    width,
    high,
    wide,
    taps,
    abreast,
    stride_y,
    stride_x,
    pad_y,
    pad_x,
    step_y,
    step_x,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """For some pixels a part of the sum over taps and channels."""
    chunks = tl.cdiv(channels, CHANNELS)
    number, ranks = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS), tl.arange(0, PADDED)
    picture, line, column = _pixel(number, high, wide)
    total = tl.zeros((PIXELS, PADDED), tl.float32)
    first = tl.program_id(1) * each
    for chunk in range(first, tl.minimum(first + each, chunks * taps)):
        tap, channel = chunk // chunks, chunk % chunks * CHANNELS + tl.arange(0, CHANNELS)
        seen = _at_tap(
            x,
            picture,
            line,
            column,
            number < pixels,
            channel,
            tap,
            channels,
            height,
            width,
            abreast,
            stride_y,
            stride_x,
            pad_y,
            pad_x,
            step_y,
            step_x,
        )
        weights = _of_tap(down, tap, ranks, channel, channels, taps, RANK)
        total = tl.dot(seen, tl.trans(weights), total)
    store(sums + tl.program_id(1).to(tl.int64) * pixels * RANK, number, ranks, RANK, pixels, RANK, total)


@triton.jit(do_not_specialize=["scale", "pixels", "parts", "biased"])
def _add_up(  # type: ignore[no-untyped-def]
    sums,
    inner,
    up,
    bias,
    output,
    scale,
    pixels,
    parts,
    outputs,
    biased,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Joins the parts, and adds b + s · inner · upᵀ to a tile of the output."""
    number, ranks = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS), tl.arange(0, PADDED)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros((PIXELS, PADDED), tl.float32)
    for _ in range(0, parts):
        total += block(sums, number, ranks, RANK, pixels, RANK)
        sums += pixels * RANK
    short = total.to(inner.dtype.element_ty)
    if tl.program_id(1) == 0:
        store(inner, number, ranks, RANK, pixels, RANK, short)
    added = scale * tl.dot(short, tl.trans(block(up, channel, ranks, RANK, outputs, RANK)))
    added += tl.load(bias + channel, mask=(channel < outputs) & (biased > 0), other=0.0).to(tl.float32)[None, :]
    add(output, number, channel, outputs, pixels, outputs, added)


@triton.jit(do_not_specialize=["parts", "each", "scale", "pixels", "source", "ups", "sums", *_PLAIN])
def _add_gradients(  # type: ignore[no-untyped-def]
    x,
    gradient,
    inner,
    through,
    down,
    of_down,
    of_up,
    of_input,
    scratch,
    arrived,
    parts,
    each,
    scale,
    pixels,
    source,
    outputs,
    ups,
    sums,
    channels,
    height,
    width,
    high,
    wide,
    taps,
    abreast,
    stride_y,
    stride_x,
    pad_y,
    pad_x,
    step_y,
    step_x,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SUMMED: tl.constexpr,
    GIVEN: tl.constexpr,
    TAPS: tl.constexpr,
):
    program = tl.program_id(0)
    if program < sums * parts:
        place, part, ranks = program % sums, program // sums, tl.arange(0, PADDED)
        begin, end = part * each, tl.minimum(part * each + each, pixels)
        if place < ups:
            added = summed(gradient, inner, begin, end, outputs, outputs, place, RANK, PADDED, CHANNELS, SUMMED)
            last, added = joined(added, scratch, arrived, place, part, parts, CHANNELS, PADDED)
            if last:
                channel = place * CHANNELS + tl.arange(0, CHANNELS)
                add(of_up, channel, ranks, RANK, outputs, RANK, scale * added)
        else:
            across = tl.cdiv(channels, CHANNELS)
            tap, channel = (place - ups) // across, (place - ups) % across * CHANNELS + tl.arange(0, CHANNELS)
            added = _summed_at_tap(
                x,
                through,
                begin,
                end,
                tap,
                channel,
                channels,
                height,
                width,
                high,
                wide,
                abreast,
                stride_y,
                stride_x,
                pad_y,
                pad_x,
                step_y,
                step_x,
                RANK,
                PADDED,
                CHANNELS,
                SUMMED,
            )
            last, added = joined(added, scratch, arrived, place, part, parts, CHANNELS, PADDED)
            if last:
                add(of_down + tap * channels, ranks, channel, taps * channels, RANK, channels, scale * tl.trans(added))
    else:
        _add_to_input(
            of_input,
            through,
            down,
            scale,
            source,
            program - sums * parts,
            channels,
            height,
            width,
            high,
            wide,
            taps,
            abreast,
            stride_y,
            stride_x,
            pad_y,
            pad_x,
            step_y,
            step_x,
            RANK,
            PADDED,
            PIXELS,
            GIVEN,
            TAPS,
        )


@triton.jit
def _summed_at_tap(  # type: ignore[no-untyped-def]
    x,
    through,
    begin,
    end,
    tap,
    channel,
    channels,
    height,
    width,
    high,
    wide,
    abreast,
    stride_y,
    stride_x,
    pad_y,
    pad_x,
    step_y,
    step_x,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    CHANNELS: tl.constexpr,
    SUMMED: tl.constexpr,
):
    """What some pixels add to the gradient of one tap, (channels, rank)."""
    ranks = tl.arange(0, PADDED)
    total = tl.zeros((CHANNELS, PADDED), tl.float32)
    for first in range(begin, end, SUMMED):
        number = first + tl.arange(0, SUMMED)
        picture, line, column = _pixel(number, high, wide)
        seen = _at_tap(
            x,
            picture,
            line,
            column,
            number < end,
            channel,
            tap,
            channels,
            height,
            width,
            abreast,
            stride_y,
            stride_x,
            pad_y,
            pad_x,
            step_y,
            step_x,
        )
        total = tl.dot(tl.trans(seen), block(through, number, ranks, RANK, end, RANK), total)
    return total


@triton.jit
def _add_to_input(  # type: ignore[no-untyped-def]
    of_input,
    through,
    down,
    scale,
    source,
    tile,
    channels,
    height,
    width,
    high,
    wide,
    taps,
    abreast,
    stride_y,
    stride_x,
    pad_y,
    pad_x,
    step_y,
    step_x,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
):
    """A tile of the input's pixels and channels gets what the pixels of the output saw of it, several taps at once."""
    across = tl.cdiv(channels, CHANNELS)
    number, ranks = tile // across * PIXELS + tl.arange(0, PIXELS), tl.arange(0, PADDED)
    channel = tile % across * CHANNELS + tl.arange(0, CHANNELS)
    picture, line, column = _pixel(number, height, width)
    lanes = tl.arange(0, TAPS * PADDED)
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for first in tl.range(0, taps, TAPS, num_stages=1):  # as large as it is, it fits but once
        tap = first + tl.arange(0, TAPS)
        y = line[:, None] + pad_y - (tap // abreast * step_y)[None, :]
        z = column[:, None] + pad_x - (tap % abreast * step_x)[None, :]
        sees = ((number < source)[:, None] & (tap < taps)[None, :]) & (y >= 0) & (z >= 0)
        sees &= (y % stride_y == 0) & (z % stride_x == 0) & (y // stride_y < high) & (z // stride_x < wide)
        at = ((picture[:, None] * high + y // stride_y) * wide + z // stride_x).to(tl.int64) * RANK
        rows = through + at[:, :, None] + ranks[None, None, :]
        narrow = tl.load(rows, mask=sees[:, :, None] & (ranks < RANK)[None, None, :], other=0.0)
        tap, rank = first + lanes // PADDED, lanes % PADDED
        inside = ((tap < taps) & (rank < RANK))[:, None] & (channel < channels)[None, :]
        weights = tl.load(down + (rank * taps + tap)[:, None] * channels + channel[None, :], mask=inside, other=0.0)
        total = tl.dot(tl.reshape(narrow, (PIXELS, TAPS * PADDED)), weights, total)
    add(of_input, number, channel, channels, source, channels, scale * total)
