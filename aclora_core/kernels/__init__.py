"""Kernels of our own for what PyTorch computes in several passes over the activations. They need Triton.

Triton comes with PyTorch's CUDA build on Linux, and compiles at the first call; for that it wants a C compiler and
Python's headers. So whether the kernels can be had is only known once they have run.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger("aclora")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_LAYERS = 3  # that linear takes at a time
DEEP = 64  # numbers that linear multiplies and adds at a time; the sides that it sums up must be multiples of it
MOST_WIDE = 4096  # of layer_norm
MOST_KEYS, MOST_CHANNELS = 128, 128  # of attention


class Geglu(Protocol):
    def __call__(self, hidden: Tensor) -> Tensor: ...


class GroupNorm(Protocol):
    def __call__(
        self, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool = False,
        shift: Tensor | None = None,
    ) -> Tensor: ...  # fmt: skip


class LayerNorm(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor: ...


class Attention(Protocol):
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor: ...


class Linear(Protocol):
    """Layers with their branches; the module of that name says more."""

    def forward(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], downs: Sequence[Tensor],
        ups: Sequence[Tensor], scale: float,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    def backward(
        self, gradients: Sequence[Tensor], weights: Sequence[Tensor], downs: Sequence[Tensor], ups: Sequence[Tensor],
        scale: float,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    def add_gradients(
        self, x: Tensor, gradients: Sequence[Tensor], inner: Tensor, through: Tensor, of_downs: Sequence[Tensor],
        of_ups: Sequence[Tensor], scale: float, of_input: Tensor | None = None, down: Tensor | None = None,
    ) -> None: ...  # fmt: skip


class Steps(NamedTuple):
    """How a convolution goes over its picture, each down and across."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


class Convolution(Protocol):
    """The branch of a convolution; the module of that name says more."""

    def add_branch(
        self, output: Tensor, bias: Tensor | None, x: Tensor, down: Tensor, up: Tensor, steps: Steps, scale: float
    ) -> Tensor: ...

    def add_gradients(
        self, x: Tensor, gradient: Tensor, inner: Tensor, through: Tensor, down: Tensor, of_down: Tensor, of_up: Tensor,
        of_input: Tensor | None, steps: Steps, scale: float,
    ) -> None: ...  # fmt: skip


class ResidualNorm(Protocol):
    def __call__(
        self, x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]: ...


class AdamW(Protocol):
    def __call__(
        self, weights: Tensor, gradient: Tensor, first: Tensor, second: Tensor, before: Tensor, copy: Tensor,
        steps: Tensor, rate: Tensor, divisor: Tensor, left_out: Tensor, betas: tuple[float, float], decay: float,
        eps: float,
    ) -> None: ...  # fmt: skip


class Kernels(NamedTuple):
    """The kernels, and the kind of device that they run on."""

    device: str
    geglu: Geglu
    group_norm: GroupNorm
    layer_norm: LayerNorm
    residual_norm: ResidualNorm
    linear: Linear
    convolution: Convolution
    attention: Attention
    adamw: AdamW

    def take(self, x: Tensor) -> bool:
        """Whether they can compute with such a tensor."""
        return x.device.type == self.device and x.dtype in DTYPES

    def take_rows(self, x: Tensor) -> bool:
        """Whether layer_norm and residual_norm can."""
        return self.take(x) and x.numel() > 0 and x.shape[-1] <= MOST_WIDE

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
def find_kernels(device: torch.device, dtype: torch.dtype) -> Kernels | None:
    """The kernels, compiled for a CUDA device and a type of activations; None where they cannot be had.

    The first call for a device takes seconds if Triton has not compiled them before, and logs once why it cannot.
    """
    if device.type != "cuda" or dtype not in DTYPES:
        return None
    try:
        from . import convolution, linear
        from .adamw import adamw
        from .attention import attention
        from .geglu import geglu
        from .group_norm import group_norm
        from .layer_norm import layer_norm, residual_norm

        norms = group_norm, layer_norm, residual_norm
        kernels = Kernels(device.type, geglu, *norms, linear, convolution, attention, adamw)
        with compiling_together(device, kernels):
            _largest_error(kernels, device, dtype)
        error = _largest_error(kernels, device, dtype)
        if not error < 0.02:
            raise ValueError(f"they are wrong by {error:.2g} on this device")
    except Exception as problem:  # a compiler, a driver or a library: whatever is wrong, training goes on without
        reason = (str(problem) or type(problem).__name__).split("\n")[0]
        log.info("AC-LoRA: steps are somewhat slower, as Triton's kernels cannot be used here (%s).", reason)
        return None
    return kernels


@contextmanager
def compiling_together(device: torch.device, kernels: Kernels | None) -> Iterator[None]:
    """Has what is computed in the context only tell which kernels are to be compiled; they are at its end, at once.

    kernels: those that are found for the device; without any this changes nothing.
    """
    if kernels is None:
        yield
        return
    from . import launch

    with launch.compiling_together(device):
        yield


def _largest_error(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> float:
    """How far outputs and gradients are from PyTorch's for small examples, as a share of the largest value.

    Ranks and types are those of most trainings, so that what is compiled for the examples is of use to them.
    """
    generator = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, device=device, dtype=dtype)
    with torch.inference_mode(False), torch.enable_grad():
        hidden = draw(3, 512).requires_grad_()
        value, gate = hidden.chunk(2, dim=-1)
        cases: list[tuple[Tensor, Tensor, tuple[Tensor, ...]]] = []
        cases.append((kernels.geglu(hidden), value * F.gelu(gate), (hidden,)))
        picture = draw(2, 320, 9, 10).contiguous(memory_format=torch.channels_last).requires_grad_()
        weight, bias, shift = draw(320), draw(320), draw(2, 320).requires_grad_()
        norm = functools.partial(kernels.group_norm, picture, 32, weight, bias, 1e-5)
        cases.append((norm(), F.group_norm(picture, 32, weight, bias, 1e-5), (picture,)))
        shifted = F.group_norm((picture.float() + shift.float()[:, :, None, None]).to(dtype), 32, weight, bias, 1e-5)
        cases.append((norm(True), F.silu(cases[1][1]), (picture,)))
        cases.append((norm(True, shift), F.silu(shifted), (picture, shift)))
        rows = draw(70, 320).requires_grad_()
        cases.append((kernels.layer_norm(rows, weight, bias, 1e-5), F.layer_norm(rows, (320,), weight, bias), (rows,)))
        added = draw(70, 320).requires_grad_()
        for more in (None, added):
            both = kernels.residual_norm(rows, more, weight, bias, 1e-5)
            right = (rows if more is None else rows + more).clone()
            expected = torch.cat([right, F.layer_norm(right, (320,), weight, bias)])
            cases.append((torch.cat(both), expected, (rows,) if more is None else (rows, more)))
        errors = []
        for ours, expected, sources in cases:
            gradient = draw(expected.shape)
            ways_back = [torch.autograd.grad(it, sources, gradient, retain_graph=True) for it in (ours, expected)]
            for found, right in ((ours.detach(), expected.detach()), *zip(*ways_back, strict=True)):
                errors.append(_error(found, right))
        errors += _errors_of_layers(kernels, draw) + _errors_of_attention(kernels, draw)
        errors += _errors_of_convolution(kernels, draw) + _errors_of_adamw(kernels, draw)
        return float(torch.stack([error.float() for error in errors]).max())


def _errors_of_layers(kernels: Kernels, draw: Callable[..., Tensor]) -> list[Tensor]:
    """The same for two layers and their branches, in the types that there are kernels for."""
    rows = 2100  # so many that their sums are shared out
    x, weights, biases, gradients = draw(rows, 128), [*draw(2, 192, 128)], [*draw(2, 192)], [*draw(2, rows, 192)]
    downs, ups = [*draw(2, 16, 128)], [*draw(2, 192, 16)]
    if not kernels.take_backward(x, weights[0], 16):
        return []
    outputs, inner = kernels.linear.forward(x, weights, biases, downs, ups, 0.5)
    of_input, through = kernels.linear.backward(gradients, weights, downs, ups, 0.5)
    of_downs, of_ups = ([tensor.clone() for tensor in factors] for factors in (downs, ups))
    kernels.linear.add_gradients(x, gradients, inner, through, of_downs, of_ups, 0.5)
    right = torch.zeros_like(of_input)
    pairs = [(of_input, right)]
    layers = zip(weights, biases, downs, ups, gradients, strict=True)
    for number, (weight, bias, down, up, gradient) in enumerate(layers):
        pairs.append((outputs[number], x @ weight.t() + bias + 0.5 * (x @ down.t()) @ up.t()))
        pairs.append((of_ups[number], up + 0.5 * gradient.t() @ (x @ down.t())))
        pairs.append((of_downs[number], down + 0.5 * (gradient @ up).t() @ x))
        right += gradient @ weight + 0.5 * (gradient @ up) @ down
    return [_error(found, wanted) for found, wanted in pairs]


def _errors_of_convolution(kernels: Kernels, draw: Callable[..., Tensor]) -> list[Tensor]:
    """The same for a convolution's branch."""
    steps, last = Steps((1, 1), (1, 1), (1, 1)), torch.channels_last
    x, output, gradient = (draw(1, width, 9, 8).contiguous(memory_format=last) for width in (80, 48, 48))
    if not kernels.take_convolution(x, 48, 16):
        return []
    down, up = draw(16, 80, 3, 3).contiguous(memory_format=last).requires_grad_(), draw(48, 16).requires_grad_()
    wanted, bias = x.detach().requires_grad_(), draw(48)
    narrow = F.conv2d(wanted, down, None, *steps)
    result = 0.5 * F.conv2d(narrow, up[:, :, None, None])
    right = [narrow, result + bias[:, None, None], *torch.autograd.grad(result, (wanted, down, up), gradient)]
    through = gradient.permute(0, 2, 3, 1).reshape(-1, 48) @ up.detach()
    ours, of_input, of_down, of_up = (torch.zeros_like(it) for it in (output, x, down, up))
    inner = kernels.convolution.add_branch(ours, bias, x, down.detach(), up.detach(), steps, 0.5)
    kernels.convolution.add_gradients(
        x, gradient, inner, through, down.detach(), of_down, of_up, of_input, steps, 0.5
    )
    found = [inner.view(1, 9, 8, 16).permute(0, 3, 1, 2), ours, of_input, of_down, of_up]
    return [_error(one, other.detach()) for one, other in zip(found, right, strict=True)]


def _errors_of_attention(kernels: Kernels, draw: Callable[..., Tensor]) -> list[Tensor]:
    """The same for attention."""
    query, key, value = given = tuple(draw(1, 2, rows, 64).requires_grad_() for rows in (70, 77, 77))
    if not kernels.take_attention(query, key, value):
        return []
    exact = [tensor.float() for tensor in given]  # by hand: the libraries' takes long to load
    plain = (torch.softmax(0.125 * exact[0] @ exact[1].mT, -1) @ exact[2]).to(query.dtype)
    results = kernels.attention(query, key, value, 0.125), plain
    gradient = draw(1, 2, 70, 64)
    ways_back = [torch.autograd.grad(result, given, gradient) for result in results]
    return [_error(*(it.detach() for it in results)), *(_error(*pair) for pair in zip(*ways_back, strict=True))]


def _errors_of_adamw(kernels: Kernels, draw: Callable[..., Tensor]) -> list[Tensor]:
    """The same for a step of AdamW."""
    weights, first, second, before = (it.float() for it in draw(4, 1536))
    gradient, copy, start, second = draw(1536), draw(1536), weights.clone(), second.square()
    slope, mean, spread = gradient.float() / 2, first.clone(), second.clone()
    if not kernels.take(gradient) or gradient.dtype == torch.float32:
        return []
    numbers = [torch.full((), value, device=start.device) for value in (3.0, 0.1, 2.0, 0.0)]
    steps, rate, divisor, left_out = numbers
    kernels.adamw(
        weights, gradient, first, second, before, copy, steps, rate, divisor, left_out, (0.9, 0.999), 0.05, 1e-8
    )
    mean, spread = 0.9 * mean + 0.1 * slope, 0.999 * spread + 0.001 * slope.square()
    root = (spread / (1 - 0.999**3)).sqrt() + 1e-8
    right = start * (1 - 0.1 * 0.05) - 0.1 / (1 - 0.9**3) * mean / root
    pairs = [(weights, right), (copy, right), (first, mean), (second, spread), (before, start)]
    return [*(_error(*pair) for pair in pairs), gradient.abs().max()]


def _error(found: Tensor, right: Tensor) -> Tensor:
    return (found - right).abs().max() / right.abs().max()
