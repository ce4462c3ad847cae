"""The trainable parameters of an adapter, all in one flat tensor.

A model may have 800 adapted layers, and a kernel for each of their factors would cost more than its arithmetic. So the
factors are views of one flat tensor: the optimizer, the norm of the gradient and the cast to the model's dtype are one
kernel each. The optimizer updates float32 weights; the model computes with a copy of them in its own dtype.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..acceleration import is_linear
from ..adapter import Layer, is_finite

log = logging.getLogger("aclora")

_ALIGNMENT = 64  # elements; matrix products want their operands to start at a multiple of 16 bytes
_CHUNK = 2**20  # numbers that are drawn, and copied to the device, at once


@dataclass(frozen=True, eq=False)
class Factor:
    """lora_down or lora_up of one layer. Both tensors share the memory of FlatParameters."""

    master: Tensor  # float32, updated by the optimizer
    compute: Tensor  # copy in the model's dtype, a leaf; its .grad is a view of the flat gradient


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """The LoRA branch of one layer while it trains."""

    down: Factor  # (rank, in) or (rank, in, *kernel); 4-d factors are channels-last in memory
    up: Factor  # (out, rank) or (out, rank, 1, ...)
    alpha: float

    @property
    def lora_down(self) -> Tensor:
        """float32 weights of the down factor."""
        return self.down.master

    @property
    def lora_up(self) -> Tensor:
        """float32 weights of the up factor."""
        return self.up.master

    @property
    def scale(self) -> float:
        """alpha / rank, as in every LoRA file."""
        return self.alpha / self.lora_down.shape[0]


class FlatParameters:
    """The factors of all layers and their gradients, as views of three flat tensors.

    Args:
        initial: layer name -> initial factors and alpha.
        device: of all tensors.
        dtype: that the model computes in.

    Attributes:
        master: (n,) float32 weights, updated by the optimizer.
        compute: (n,) copy of them in `dtype`; master itself if that is float32.
        gradient: (n,) in `dtype`; backward passes add to it.
        layers: layer name -> views of the flat tensors.
    """

    def __init__(self, initial: Mapping[str, Layer], device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        shapes = [shape for layer in initial.values() for shape in (layer.lora_down.shape, layer.lora_up.shape)]
        starts, size = _starts(shapes)
        self.master = torch.zeros(size, device=device)
        self.compute = self.master if dtype == torch.float32 else torch.zeros(size, device=device, dtype=dtype)
        self.gradient = torch.zeros_like(self.compute)
        factors = iter([self._factor(start, shape) for start, shape in zip(starts, shapes, strict=True)])
        self.layers = {name: LoraLayer(next(factors), next(factors), layer.alpha) for name, layer in initial.items()}
        self.load(initial)

    def _factor(self, start: int, shape: torch.Size) -> Factor:
        span = slice(start, start + math.prod(shape))
        compute = _view(self.compute[span], shape).detach().requires_grad_()
        compute.grad = _view(self.gradient[span], shape)
        return Factor(_view(self.master[span], shape), compute)

    def refresh(self) -> None:
        """Copy the float32 weights into the model's dtype, after they have changed."""
        if self.compute is not self.master:
            with torch.no_grad():
                self.compute.copy_(self.master)

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Let no branch add anything while the context lasts, for forward passes of the frozen model alone.

        All factors are zero meanwhile. The CPU waits for nothing, so that a CUDA graph can hold all of it.
        """
        kept = self.compute.clone()
        self.compute.zero_()
        try:
            yield
        finally:
            self.compute.copy_(kept)

    def load(self, layers: Mapping[str, Layer]) -> None:
        """Load the deltas of all layers; a rank below the adapter's own is padded with zeros.

        Raises:
            KeyError: a layer of the adapter is missing.
        """
        with torch.no_grad():
            for name, branch in self.layers.items():
                layer = layers[name]
                branch.lora_down.zero_()[: layer.rank] = layer.lora_down
                branch.lora_up.zero_()[:, : layer.rank] = layer.lora_up * (layer.scale / branch.scale)
        self.refresh()

    def to_layers(self, dtype: torch.dtype = torch.float32) -> dict[str, Layer]:
        """Copy all factors to main memory in a dtype.

        They come in one piece: a thousand small operations on the CPU take seconds while other programs keep its
        cores busy. They are converted there, as the device may have no memory left.

        Raises:
            ValueError: a weight is not finite in that dtype.
        """
        flat = self.master.detach().to("cpu").to(dtype)
        if dtype != self.master.dtype and not is_finite(flat):
            raise ValueError(f"The LoRA holds NaN, infinity, or a number that is too large for {dtype}.")

        def own(factor: Factor) -> Tensor:
            part = _view(flat[self.span(factor.master)], factor.master.shape)
            return part.clone(memory_format=torch.contiguous_format)

        return {name: Layer(own(layer.down), own(layer.up), layer.alpha) for name, layer in self.layers.items()}

    def span(self, factor: Tensor) -> slice:
        """The elements of the flat tensors that a factor's master is a view of."""
        start = factor.storage_offset() - self.master.storage_offset()
        return slice(start, start + factor.numel())


def _starts(shapes: Sequence[torch.Size]) -> tuple[list[int], int]:
    """Aligned start of each factor in the flat tensor, and its total length."""
    starts = []
    end = 0
    for shape in shapes:
        starts.append(end)
        end += -(-math.prod(shape) // _ALIGNMENT) * _ALIGNMENT
    return starts, end


def _view(elements: Tensor, shape: torch.Size) -> Tensor:
    """View a part of a flat tensor as a factor; 4-d factors channels-last, as convolution kernels read them."""
    if len(shape) != 4:
        return elements.view(shape)
    features, channels, height, width = shape
    return elements.view(features, height, width, channels).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class LoraSpec:
    """Rank and alpha of an adapter's layers."""

    rank: int  # of every layer that is large enough and not in rank_pattern
    alpha: float  # at that rank; other ranks get alpha in proportion, so that scale = alpha / rank stays
    rank_pattern: Mapping[str, int] = field(default_factory=dict)  # layer name -> another rank
    alpha_scales: Mapping[str, float] = field(default_factory=dict)  # layer name -> factor of its alpha


def make_parameters(
    layers: Mapping[str, nn.Module],
    spec: LoraSpec,
    generator: torch.Generator,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> FlatParameters:
    """Initialise a LoRA branch for each layer: lora_down uniform in ±1/√fan_in, lora_up zero.

    A rank above the full rank of a layer's weight is lowered to it.

    Args:
        layers: name -> linear or convolution layer.
        spec: ranks and alphas.
        generator: on the CPU, for lora_down.
        device: of the parameters.
        dtype: that the model computes in.

    Raises:
        ValueError: the rank is above the full rank of every layer.
    """
    shapes = {name: _weight_shape(module) for name, module in layers.items()}
    largest = max(_full_rank(shape) for shape in shapes.values())
    if spec.rank > largest:
        raise ValueError(
            f"The maximum rank is {spec.rank}, but the model's largest layer can only have rank {largest}. "
            f"Set the maximum rank to {largest} or less."
        )
    wanted = {name: spec.rank_pattern.get(name, spec.rank) for name in shapes}
    ranks = {name: min(wanted[name], _full_rank(shape)) for name, shape in shapes.items()}
    if lowered := sum(ranks[name] < wanted[name] for name in shapes):
        log.info(
            "AC-LoRA: %d of %d layers are too small for their rank and get the largest that fits.", lowered, len(layers)
        )
    downs = _draw_downs([(ranks[name], *shape[1:]) for name, shape in shapes.items()], generator, device)
    initial: dict[str, Layer] = {}
    for (name, (outputs, *_)), down in zip(shapes.items(), downs, strict=True):
        alpha = spec.alpha * ranks[name] / spec.rank * spec.alpha_scales.get(name, 1.0)
        initial[name] = Layer(down, _zero_up(outputs, down), alpha)
    return FlatParameters(initial, device, dtype)


def _draw_downs(shapes: Sequence[tuple[int, ...]], generator: torch.Generator, device: torch.device) -> list[Tensor]:
    """Draw lora_down of each layer, uniform in ±1/√fan_in. shapes: (rank, in) or (rank, in, *kernel)."""
    sizes = [math.prod(shape) for shape in shapes]
    drawn = _draw_uniform(sum(sizes), generator, device).mul_(2).sub_(1).split(sizes)
    bounds = [1 / math.sqrt(math.prod(inputs)) for _, *inputs in shapes]
    return [down.mul_(bound).view(shape) for down, bound, shape in zip(drawn, bounds, shapes, strict=True)]


def _draw_uniform(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Draw numbers between 0 and 1 on the CPU, (count,) on the device; any number of calls draws the same.

    Fresh main memory for all of them would take longer than to draw them, so they go to the device chunk by chunk.
    """
    drawn = torch.empty(count, device=device)
    chunk = torch.empty(min(count, _CHUNK))
    for part in drawn.split(_CHUNK):
        part.copy_(torch.rand(len(part), generator=generator, out=chunk[: len(part)]))
    return drawn


def _zero_up(outputs: int, down: Tensor) -> Tensor:
    """Return lora_up of a new layer: a view of one zero, which takes no memory."""
    return down.new_zeros(()).expand(outputs, len(down), *(1 for _ in down.shape[2:]))


def _full_rank(shape: tuple[int, ...]) -> int:
    """The largest rank of a weight, seen as a matrix (out, in · kernel)."""
    outputs, *inputs = shape
    return min(outputs, math.prod(inputs))


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    """(out, in) or (out, in, *kernel). Taken from the layer's sizes, as a quantised weight has another shape."""
    if is_linear(module):
        linear: Any = module
        return linear.out_features, linear.in_features
    convolution: Any = module
    return convolution.out_channels, convolution.in_channels, *convolution.kernel_size
