"""What the kernels of convolutions with LoRA branches share: the position of pixels, and what a tap reads.

A tap is one position (y, x) within the convolution kernel. Images are channels last in memory, and read here as rows,
one for each pixel of each image.
"""

from __future__ import annotations

from torch import Tensor

from ._triton import tl, triton
from .kernel import HALF_DTYPES, MAX_RANK, ConvParams

GEOMETRY_PARAMETERS = (  # integers not worth a compilation of their own when they are 1 or a multiple of 16
    "height",
    "width",
    "out_height",
    "out_width",
    "taps",
    "kernel_width",
    "stride_y",
    "stride_x",
    "pad_y",
    "pad_x",
    "dilation_y",
    "dilation_x",
)


def supports_images(x: Tensor, outputs: int, rank: int) -> bool:
    """Return whether the kernels can read images (n, in, h, w), and compiling them for these channels pays off."""
    in_blocks = x.shape[1] % 16 == 0 and outputs % 16 == 0  # images of few channels occur in one layer only
    return x.dtype in HALF_DTYPES and x.numel() > 0 and in_blocks and rank <= MAX_RANK


def shape_arguments(x: Tensor, output: Tensor) -> tuple[int, ...]:
    """Channels, height and width of the input; height and width of the output."""
    return *x.shape[1:], *output.shape[2:]


def geometry_arguments(down: Tensor, params: ConvParams) -> tuple[int, ...]:
    """Number of taps, width of the kernel; stride, padding and dilation along y and x."""
    return down[0, 0].numel(), down.shape[3], *params.stride, *params.padding, *params.dilation


@triton.jit
def pixel_position(pixel, height, width):  # type: ignore[no-untyped-def]
    """Image, row and column of a pixel, from its flat index."""
    return pixel // (height * width), pixel // width % height, pixel % width


@triton.jit
def load_at_tap(  # type: ignore[no-untyped-def]
    x,
    image,
    row,
    column,
    inside,
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
):
    """Load the inputs that a tap of the convolution kernel reads for some output pixels; zero beyond the edges."""
    y_in = row * stride_y - pad_y + tap // kernel_width * dilation_y
    x_in = column * stride_x - pad_x + tap % kernel_width * dilation_x
    inside = inside & (y_in >= 0) & (y_in < height) & (x_in >= 0) & (x_in < width)
    offset = ((image.to(tl.int64) * height + y_in) * width + x_in) * channels
    mask = inside[:, None] & (channel < channels)[None, :]
    return tl.load(x + offset[:, None] + channel[None, :], mask=mask, other=0.0)


@triton.jit
def load_tap_weights(down, tap, ranks, channel, channels, taps, RANK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load the weights of one tap, (rank, channels)."""
    offset = (ranks * taps + tap)[:, None] * channels + channel[None, :]
    return tl.load(down + offset, mask=(ranks < RANK)[:, None] & (channel < channels)[None, :], other=0.0)
