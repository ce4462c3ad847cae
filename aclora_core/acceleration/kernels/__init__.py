"""Kernels of our own for what PyTorch computes in several passes over the activations. They need Triton.

Triton comes with PyTorch's CUDA build on Linux, and compiles at the first call; for that it wants a C compiler and
Python's headers. So whether the kernels can be had is only known once they have run.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

log = logging.getLogger("aclora")

KernelGroup = Literal["layers", "pictures", "sequences"]  # what kernels are for: those of UNets are of no use to Flux
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_LAYERS = 3  # that linear takes at a time
DEEP = 64  # numbers that linear multiplies and adds at a time; the sides that it sums up must be multiples of it
MOST_WIDE = 4096  # of what takes whole rows
MOST_KEYS, MOST_CHANNELS = 128, 128  # of attention


class Geglu(Protocol):
    def __call__(self, hidden: Tensor) -> Tensor: ...


class GroupNorm(Protocol):
    def __call__(
        self,
        x: Tensor,
        groups: int,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        silu: bool = False,
        shift: Tensor | None = None,
    ) -> Tensor: ...


class LayerNorm(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor: ...


class RmsNorm(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...


class Rotate(Protocol):
    def __call__(self, x: Tensor, table: Tensor) -> Tensor: ...


class Gelu(Protocol):
    def __call__(self, x: Tensor, tanh: bool) -> Tensor: ...


class Attention(Protocol):
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor: ...


class Linear(Protocol):
    """Layers with their branches; the module of that name says more."""

    def forward(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        downs: Sequence[Tensor],
        ups: Sequence[Tensor],
        scale: float,
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
        gradients: Sequence[Tensor],
        weights: Sequence[Tensor],
        downs: Sequence[Tensor],
        ups: Sequence[Tensor],
        scale: float,
    ) -> tuple[Tensor, Tensor]: ...

    def add_gradients(
        self,
        x: Tensor,
        gradients: Sequence[Tensor],
        inner: Tensor,
        through: Tensor,
        of_downs: Sequence[Tensor],
        of_ups: Sequence[Tensor],
        scale: float,
        of_input: Tensor | None = None,
        down: Tensor | None = None,
    ) -> None: ...


class ConvParams(NamedTuple):
    """How a convolution goes over its picture, each down and across."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


class Convolution(Protocol):
    """The branch of a convolution; the module of that name says more."""

    def add_branch(
        self, output: Tensor, bias: Tensor | None, x: Tensor, down: Tensor, up: Tensor, steps: ConvParams, scale: float
    ) -> Tensor: ...

    def add_gradients(
        self,
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
    ) -> None: ...


class ResidualNorm(Protocol):
    def __call__(
        self, x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]: ...


class AdamW(Protocol):
    def __call__(
        self,
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
    ) -> None: ...


class Kernels(NamedTuple):
    """The kernels, and the kind of device that they run on."""

    device: str
    geglu: Geglu
    gelu: Gelu
    group_norm: GroupNorm
    layer_norm: LayerNorm
    residual_norm: ResidualNorm
    rms_norm: RmsNorm
    rotate: Rotate
    linear: Linear
    convolution: Convolution
    attention: Attention
    adamw: AdamW

    def take(self, x: Tensor) -> bool:
        """Whether they can compute with such a tensor."""
        return x.device.type == self.device and x.dtype in DTYPES

    def take_rows(self, x: Tensor) -> bool:
        """Whether layer_norm, residual_norm and rms_norm can."""
        return self.take(x) and x.numel() > 0 and x.shape[-1] <= MOST_WIDE

    def take_rotation(self, x: Tensor, table: Tensor) -> bool:
        """Whether rotate can."""
        if not (self.take(x) and x.dim() == 4 and 0 < x.shape[-1] <= MOST_WIDE and x.numel() > 0):
            return False
        if table.dim() != 6 or table.dtype != torch.float32 or table.device != x.device or table.requires_grad:
            return False
        fits = all(size in (1, wanted) for size, wanted in zip(table.shape[:3], x.shape[:3], strict=True))
        return fits and x.shape[-1] % 2 == 0 and table.shape[3:] == (x.shape[-1] // 2, 2, 2)

    def take_forward(self, x: Tensor, weight: Tensor, rank: int) -> bool:
        """Whether linear.forward can, and is quicker than PyTorch, whose large products are better."""
        return self._take_linear(x, weight, rank) and len(x) * weight.numel() <= 5e9

    def take_backward(self, gradient: Tensor, weight: Tensor, rank: int) -> bool:
        """The same for linear.backward."""
        return self._take_linear(gradient, weight, rank) and weight.numel() <= 2e6

    def take_sums(self, x: Tensor, gradient: Tensor, rank: int) -> bool:
        """The same for linear.add_gradients; PyTorch shares long sums out."""
        return self._take_thin(x, rank) and self._take_thin(gradient, rank) and len(x) <= 16384

    def take_convolution(self, x: Tensor, outputs: int, rank: int) -> bool:
        """Whether convolution.add_branch can, and is worth its compilation: pictures of a few channels come once."""
        whole = x.shape[1] % 16 == 0 and outputs % 16 == 0
        return self.take(x) and x.dtype != torch.float32 and x.numel() > 0 and whole and rank <= 64

    def take_way_back(self, x: Tensor, gradient: Tensor, rank: int) -> bool:
        """Whether convolution.add_gradients can, and is quicker than the libraries, which share long sums out."""
        pixels = gradient.numel() // max(1, gradient.shape[1])
        return self.take_convolution(x, gradient.shape[1], rank) and pixels <= 8192

    def _take_linear(self, rows: Tensor, weight: Tensor, rank: int) -> bool:
        whole = all(side % DEEP == 0 for side in weight.shape) and weight.is_contiguous()
        return self._take_thin(rows, rank) and whole and weight.dtype == rows.dtype

    def _take_thin(self, rows: Tensor, rank: int) -> bool:
        return self.take(rows) and rows.dtype != torch.float32 and rows.stride(1) == 1 and len(rows) > 0 and rank <= 64

    def take_attention(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether attention can, and is quicker than the libraries' kernels, which like many keys."""
        given = query, key, value
        alike = all(it.dim() == 4 and it.dtype == query.dtype and it.stride(-1) == 1 and self.take(it) for it in given)
        few = alike and 0 < key.shape[2] <= MOST_KEYS and query.shape[-1] <= MOST_CHANNELS
        few = few and query.dtype != torch.float32
        same = few and key.shape == value.shape and key.shape[:2] == query.shape[:2] and key.shape[3] == query.shape[3]
        return same and query.numel() > 0

    def take_picture(self, x: Tensor) -> bool:
        """Whether group_norm can; pictures whose channels come first in memory are left to PyTorch."""
        return (
            self.take(x)
            and x.dim() == 4
            and x.is_contiguous(memory_format=torch.channels_last)
            and not x.is_contiguous()
        )


@functools.lru_cache
def find_kernels(device: torch.device, dtype: torch.dtype, part: KernelGroup) -> Kernels | None:
    """The kernels, of which a part is compiled and tried for a CUDA device and a type of activations; None where that
    part cannot be had.

    The first call for a device takes seconds if Triton has not compiled them before, and logs once why it cannot.
    """
    if device.type != "cuda" or dtype not in DTYPES:
        return None
    try:
        from . import lora_conv as convolution
        from . import lora_linear as linear
        from .adamw import adamw
        from .geglu import geglu
        from .gelu import gelu
        from .group_norm import group_norm
        from .layer_norm import layer_norm, residual_norm
        from .rms_norm import rms_norm
        from .rope import rotate
        from .self_test import largest_error
        from .short_key_attention import attention

        norms = group_norm, layer_norm, residual_norm, rms_norm
        kernels = Kernels(device.type, geglu, gelu, *norms, rotate, linear, convolution, attention, adamw)
        with compile_in_parallel(device, kernels):
            largest_error(kernels, device, dtype, part)
        error = largest_error(kernels, device, dtype, part)
        if not error < 0.02:
            raise ValueError(f"they are wrong by {error:.2g} on this device")
    except Exception as problem:  # a compiler, a driver or a library: whatever is wrong, training goes on without
        reason = (str(problem) or type(problem).__name__).split("\n")[0]
        log.info("AC-LoRA: steps are somewhat slower, as Triton's kernels for %s cannot be used (%s).", part, reason)
        return None
    return kernels


@contextmanager
def compile_in_parallel(device: torch.device, kernels: Kernels | None) -> Iterator[None]:
    """Has what is computed in the context only tell which kernels are to be compiled; they are at its end, at once.

    kernels: those that are found for the device; without any this changes nothing.
    """
    if kernels is None:
        yield
        return
    from . import launch

    with launch.compiling_together(device):
        yield
