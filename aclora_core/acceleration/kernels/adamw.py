"""One AdamW step over flat weights, in one memory pass.

The update is memory-bound, so backup, AdamW, cast to the model's dtype and zero_grad are fused into one pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._triton import tl, triton
from .kernel import HALF_DTYPES, Draw, Kernel
from .launch import launch

_BLOCK = 1024  # elements of a program


def adamw(
    weights: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    previous: Tensor,
    compute: Tensor,
    step: Tensor,
    lr: Tensor,
    divisor: Tensor,
    skipped: Tensor,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float,
) -> None:
    """Do one step with gradient / divisor, as torch.optim.AdamW (Loshchilov, Hutter 2019, arXiv 1711.05101, alg. 2).

    Args:
        weights: (n,), float32; updated in place, as exp_avg and exp_avg_sq are.
        gradient: (n,), of any dtype; set to zero.
        exp_avg: (n,), float32, the first moment.
        exp_avg_sq: (n,), float32, the second moment.
        previous: (n,), float32; receives the weights before the step.
        compute: (n,), of any dtype; receives the weights after the step.
        step: (), float32, the number of steps including this one.
        lr: (), float32, the learning rate.
        divisor: (), float32, the scale of the loss times what gradient clipping divides by.
        skipped: (), float32; unless it is 0, the gradient is set to zero and nothing else is done.
        betas: decay rates of the two moments.
        weight_decay: decoupled weight decay, times the learning rate.
        eps: added to the root of the second moment.
    """
    count = weights.numel()
    with torch.cuda.device_of(weights):
        launch(
            _step,
            (triton.cdiv(count, _BLOCK),),
            weights,
            gradient,
            exp_avg,
            exp_avg_sq,
            previous,
            compute,
            step,
            lr,
            divisor,
            skipped,
            weight_decay,
            eps,
            count,
            *betas,
            *(math.log(beta) for beta in betas),
            _BLOCK,
        )


def supports(gradient: Tensor) -> bool:
    """Gradients in half precision; PyTorch's fused step serves float32."""
    return gradient.dtype in HALF_DTYPES


def reference(
    weights: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    previous: Tensor,
    compute: Tensor,
    step: Tensor,
    lr: Tensor,
    divisor: Tensor,
    skipped: Tensor,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float,
) -> None:
    """Do adamw in plain PyTorch."""
    if not skipped:
        grad = gradient.float() / divisor
        previous.copy_(weights)
        exp_avg.lerp_(grad, 1 - betas[0])
        exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
        root = (exp_avg_sq / (1 - betas[1] ** step)).sqrt() + eps
        weights.mul_(1 - lr * weight_decay).sub_(lr / (1 - betas[0] ** step) * exp_avg / root)
        compute.copy_(weights)
    gradient.zero_()


def examples(draw: Draw) -> Iterator[tuple[Any, ...]]:
    """The third step of weights that fill one program and a half."""
    weights, exp_avg, root, previous = draw(4, 1536).float()
    gradient, compute = draw(2, 1536)
    scalars = [torch.full((), value, device=weights.device) for value in (3.0, 0.1, 2.0, 0.0)]
    yield weights, gradient, exp_avg, root.square(), previous, compute, *scalars, (0.9, 0.999), 0.05, 1e-8


KERNEL = Kernel("lora", adamw, supports, reference, examples)


@triton.jit(do_not_specialize=["weight_decay", "eps"])
def _step(  # type: ignore[no-untyped-def]
    weights,
    gradient,
    exp_avg,
    exp_avg_sq,
    previous,
    compute,
    step,
    lr,
    divisor,
    skipped,
    weight_decay,
    eps,
    count,
    BETA_1: tl.constexpr,
    BETA_2: tl.constexpr,
    LOG_BETA_1: tl.constexpr,
    LOG_BETA_2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    if tl.load(skipped) == 0:
        steps, rate = tl.load(step).to(tl.float64), tl.load(lr)
        # In float64: at first they are near 0, as the difference of numbers near 1.
        correction_1 = (1 - tl.exp(steps * LOG_BETA_1)).to(tl.float32)
        correction_2 = (1 - tl.exp(steps * LOG_BETA_2)).to(tl.float32)
        grad = tl.load(gradient + index, mask=mask, other=0.0).to(tl.float32) / tl.load(divisor)
        weight = tl.load(weights + index, mask=mask, other=0.0)
        tl.store(previous + index, weight, mask=mask)
        mean = tl.load(exp_avg + index, mask=mask, other=0.0)
        mean += (1 - BETA_1) * (grad - mean)
        mean_sq = BETA_2 * tl.load(exp_avg_sq + index, mask=mask, other=0.0) + (1 - BETA_2) * grad * grad
        weight -= rate * weight_decay * weight
        weight -= rate / correction_1 * mean / (tl.sqrt(mean_sq) / tl.sqrt(correction_2) + eps)
        tl.store(exp_avg + index, mean, mask=mask)
        tl.store(exp_avg_sq + index, mean_sq, mask=mask)
        tl.store(weights + index, weight, mask=mask)
        tl.store(compute + index, weight.to(compute.dtype.element_ty), mask=mask)
    tl.store(gradient + index, tl.zeros((BLOCK,), gradient.dtype.element_ty), mask=mask)
