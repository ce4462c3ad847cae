"""Kernels of our own for what PyTorch computes in several passes over the activations. They need Triton.

Triton comes with PyTorch's CUDA build on Linux, and compiles at the first call; for that it wants a C compiler and
Python's headers. So whether the kernels can be had is only known once they have run.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger("aclora")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Geglu(Protocol):
    def __call__(self, hidden: Tensor) -> Tensor: ...


class GroupNorm(Protocol):
    def __call__(
        self, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool = False
    ) -> Tensor: ...


class ThroughOutput(Protocol):
    def __call__(self, gradient: Tensor, inner: Tensor, up: Tensor, of_up: Tensor, scale: float) -> Tensor: ...


class ThroughInput(Protocol):
    def __call__(
        self, of_input: Tensor | None, x: Tensor, through: Tensor, down: Tensor, of_down: Tensor, scale: float
    ) -> None: ...


class Kernels(NamedTuple):
    """The kernels, and the kind of device that they run on."""

    device: str
    geglu: Geglu
    group_norm: GroupNorm
    through_output: ThroughOutput
    through_input: ThroughInput

    def take(self, x: Tensor) -> bool:
        """Whether they can compute with such a tensor."""
        return x.device.type == self.device and x.dtype in DTYPES

    def take_output(self, gradient: Tensor, rank: int) -> bool:
        """Whether through_output can, and is quicker than PyTorch, which shares long sums out."""
        return self._take_thin(gradient, rank) and max(gradient.shape) <= 5120

    def take_input(self, x: Tensor, rank: int) -> bool:
        """The same for through_input."""
        return self._take_thin(x, rank) and len(x) <= 2048

    def _take_thin(self, rows: Tensor, rank: int) -> bool:
        return self.take(rows) and rows.dtype != torch.float32 and rows.stride(1) == 1 and len(rows) > 0 and rank <= 64

    def take_picture(self, x: Tensor) -> bool:
        """Whether group_norm can; pictures whose channels come first in memory are left to PyTorch."""
        return (
            self.take(x)
            and x.dim() == 4
            and x.is_contiguous(memory_format=torch.channels_last)
            and not x.is_contiguous()
        )


@functools.lru_cache
def find_kernels(device: torch.device, dtype: torch.dtype) -> Kernels | None:
    """The kernels, compiled for a CUDA device and a type of activations; None where they cannot be had.

    The first call for a device takes seconds if Triton has not compiled them before, and logs once why it cannot.
    """
    if device.type != "cuda" or dtype not in DTYPES:
        return None
    try:
        from .branch import through_input, through_output
        from .geglu import geglu
        from .group_norm import group_norm

        kernels = Kernels(device.type, geglu, group_norm, through_output, through_input)
        error = _largest_error(kernels, device, dtype)
        if not error < 0.02:
            raise ValueError(f"they are wrong by {error:.2g} on this device")
    except Exception as problem:  # a compiler, a driver or a library: whatever is wrong, training goes on without
        reason = (str(problem) or type(problem).__name__).split("\n")[0]
        log.info("AC-LoRA: steps are somewhat slower, as Triton's kernels cannot be used here (%s).", reason)
        return None
    return kernels


def _largest_error(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> float:
    """How far outputs and gradients are from PyTorch's for small examples, as a share of the largest value."""
    generator = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, device=device, dtype=dtype)
    with torch.inference_mode(False), torch.enable_grad():
        hidden = draw(3, 512).requires_grad_()
        value, gate = hidden.chunk(2, dim=-1)
        pairs = [(kernels.geglu(hidden), value * F.gelu(gate), hidden)]
        picture = draw(2, 320, 9, 10).contiguous(memory_format=torch.channels_last).requires_grad_()
        weight, bias = draw(320), draw(320)
        normed = F.group_norm(picture, 32, weight, bias, 1e-5)
        for silu, expected in ((False, normed), (True, F.silu(normed))):
            pairs.append((kernels.group_norm(picture, 32, weight, bias, 1e-5, silu), expected, picture))
        errors = []
        for ours, expected, source in pairs:
            gradient = draw(expected.shape)
            ways_back = [torch.autograd.grad(it, source, gradient, retain_graph=True)[0] for it in (ours, expected)]
            for found, right in ((ours.detach(), expected.detach()), ways_back):
                errors.append(_error(found, right))
        return float(torch.stack([*errors, *_errors_of_branch(kernels, draw)]).max())


def _errors_of_branch(kernels: Kernels, draw: Callable[..., Tensor]) -> list[Tensor]:
    """The same for a branch's way back, in the types that it has kernels for."""
    x, inner, gradient = draw(70, 96), draw(70, 4), draw(70, 80)
    down, up, of_input = draw(4, 96), draw(80, 4), draw(70, 96)
    if not kernels.take_output(gradient, 4):
        return []
    of_up, of_down, before = up.clone(), down.clone(), of_input.clone()
    through = kernels.through_output(gradient, inner, up, of_up, 0.5)
    kernels.through_input(of_input, x, through, down, of_down, 0.5)
    pairs = (
        (through, gradient @ up), (of_up, up + 0.5 * gradient.t() @ inner),
        (of_input, before + 0.5 * through @ down), (of_down, down + 0.5 * through.t() @ x),
    )  # fmt: skip
    return [_error(found, right) for found, right in pairs]


def _error(found: Tensor, right: Tensor) -> Tensor:
    return (found - right).abs().max() / right.abs().max()
