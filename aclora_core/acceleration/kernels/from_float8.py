"""Weights in float8, converted to the dtype that a model computes in.

PyTorch's conversion takes several times as long as its memory traffic. Triton's own needs a GPU that computes in
float8, so the bits are moved here by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._triton import tl, triton
from .kernel import Draw, Kernel
from .launch import launch

_BLOCK = 2048  # elements of a program


def from_float8(output: Tensor, bits: Tensor, e5m2: bool) -> None:
    """Write float8 numbers in another dtype (Micikevicius et al. 2022, arXiv 2209.05433, table 1).

    Args:
        output: the shape of bits, contiguous; overwritten.
        bits: uint8, contiguous: the float8 numbers as bytes.
        e5m2: whether they are of type float8_e5m2; else of float8_e4m3fn.
    """
    count = bits.numel()
    with torch.cuda.device_of(bits):
        launch(_convert, (triton.cdiv(count, _BLOCK),), output, bits, count, e5m2, _BLOCK, num_warps=4)


def supports(output: Tensor, bits: Tensor) -> bool:
    """Contiguous tensors that are not empty."""
    return output.is_contiguous() and bits.is_contiguous() and bits.numel() > 0


def reference(output: Tensor, bits: Tensor, e5m2: bool) -> None:
    """Convert in plain PyTorch."""
    output.copy_(bits.view(torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn))


def examples(draw: Draw) -> Iterator[tuple[Any, ...]]:
    """All numbers that are finite, in both types."""
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        numbers = torch.arange(256, dtype=torch.uint8, device=draw(1).device)
        finite = numbers[numbers.view(kind).float().isfinite()]
        yield draw(len(finite)), finite, kind == torch.float8_e5m2


KERNEL = Kernel("lora", from_float8, supports, reference, examples)


@triton.jit
def _convert(output, bits, count, E5M2: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    # A count that is known to be a multiple of 16 lets a thread read and write its elements together.
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    byte = tl.load(bits + index, mask=index < count, other=0).to(tl.int32)
    # The bits of exponent and fraction, put where float32 has them, give the number divided by a power of two, since
    # the exponents are counted from other numbers.
    shift: tl.constexpr = 21 if E5M2 else 20
    scale: tl.constexpr = 2.0**112 if E5M2 else 2.0**120
    magnitude = ((byte & 127) << shift).to(tl.float32, bitcast=True) * scale
    number = tl.where(byte >= 128, -magnitude, magnitude)
    tl.store(output + index, number.to(output.dtype.element_ty), mask=index < count)
