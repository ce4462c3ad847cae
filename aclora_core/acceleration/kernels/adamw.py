"""A step of AdamW with all that goes with it, in one pass over the weights. Importing this file needs Triton.

By itself each part of an update reads and writes millions of numbers: keeping the weights as they were, the step, the
copy in the model's type, clearing the gradient. What counts here is memory traffic, so they share it.
"""

from __future__ import annotations

import math

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from .launch import launch

_NUMBERS = 1024  # of a program


def adamw(
    weights: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    before: Tensor,
    copy: Tensor,
    steps: Tensor,
    rate: Tensor,
    divisor: Tensor,
    left_out: Tensor,
    betas: tuple[float, float],
    decay: float,
    eps: float,
) -> None:
    """One step (Loshchilov, Hutter 2019, arXiv 1711.05101, algorithm 2) with gradient / divisor, as PyTorch does it.

    weights, first and second moment, and before, which gets the weights as they were: (n,), float32. gradient: (n,), of
    any type; is cleared. copy: (n,), gets the weights in its own type. steps: how many there have been, this one
    included; with rate, divisor and left_out float32 of no dimension. Where left_out is not 0 only the gradient is
    cleared.
    """
    count = weights.numel()
    with torch.cuda.device_of(weights):
        launch(
            _step,
            (triton.cdiv(count, _NUMBERS),),
            weights,
            gradient,
            first,
            second,
            before,
            copy,
            steps,
            rate,
            divisor,
            left_out,
            decay,
            eps,
            count,
            *betas,
            *(math.log(beta) for beta in betas),
            _NUMBERS,
        )


@triton.jit(do_not_specialize=["decay", "eps"])
def _step(  # type: ignore[no-untyped-def]
    weights,
    gradient,
    first,
    second,
    before,
    copy,
    steps,
    rate,
    divisor,
    left_out,
    decay,
    eps,
    count,
    BETA_1: tl.constexpr,
    BETA_2: tl.constexpr,
    LOG_1: tl.constexpr,
    LOG_2: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    inside = at < count
    if tl.load(left_out) == 0:
        done, speed = tl.load(steps).to(tl.float64), tl.load(rate)
        # In float64: they begin near 0, as the difference of numbers near 1.
        of_first, of_second = (1 - tl.exp(done * LOG_1)).to(tl.float32), (1 - tl.exp(done * LOG_2)).to(tl.float32)
        slope = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32) / tl.load(divisor)
        weight = tl.load(weights + at, mask=inside, other=0.0)
        tl.store(before + at, weight, mask=inside)
        mean = tl.load(first + at, mask=inside, other=0.0)
        mean += (1 - BETA_1) * (slope - mean)
        spread = BETA_2 * tl.load(second + at, mask=inside, other=0.0) + (1 - BETA_2) * slope * slope
        weight -= speed * decay * weight
        weight -= speed / of_first * mean / (tl.sqrt(spread) / tl.sqrt(of_second) + eps)
        tl.store(first + at, mean, mask=inside)
        tl.store(second + at, spread, mask=inside)
        tl.store(weights + at, weight, mask=inside)
        tl.store(copy + at, weight.to(copy.dtype.element_ty), mask=inside)
    tl.store(gradient + at, tl.zeros((NUMBERS,), gradient.dtype.element_ty), mask=inside)
