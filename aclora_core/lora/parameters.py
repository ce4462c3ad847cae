"""All factors of an adapter in one tensor, so that a step works on the whole of it at once.

A model may have 800 adapted layers, and a kernel for each of their factors costs more than the arithmetic. So the
factors are views of one flat tensor: the optimizer, the norm of the gradient and the cast to the model's type are one
kernel each. The weights that the optimizer changes are float32; the model works on a copy in its own type.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..acceleration import is_linear
from ..adapter import Layer

log = logging.getLogger("aclora")

_ALIGNMENT = 64  # numbers; matrix products want their operands to begin at a multiple of 16 bytes


@dataclass(frozen=True, eq=False)
class Factor:
    """lora_down or lora_up of one layer."""

    master: Tensor  # float32, what the optimizer changes
    compute: Tensor  # the same in the model's type; its .grad is a view of the adapter's flat gradient


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """One layer's adapter while it trains."""

    down: Factor  # (rank, in) or (rank, in, kernel...), of which two-dimensional ones stand channels last in memory
    up: Factor  # (out, rank) or (out, rank, 1...)
    alpha: float

    @property
    def lora_down(self) -> Tensor:
        return self.down.master

    @property
    def lora_up(self) -> Tensor:
        return self.up.master

    @property
    def scale(self) -> float:
        """alpha / rank, as in every LoRA file."""
        return self.alpha / self.lora_down.shape[0]

    def layer(self) -> Layer:
        """A copy in main memory."""
        down, up = (factor.to("cpu", copy=True).contiguous() for factor in (self.lora_down, self.lora_up))
        return Layer(down, up, self.alpha)


class FlatParameters:
    """The factors of all layers and their gradients, each kind in one flat tensor.

    start: name -> the factors that a layer begins with and its alpha. dtype: the type that the model computes in.
    """

    def __init__(self, start: Mapping[str, Layer], device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        shapes = [shape for layer in start.values() for shape in (layer.lora_down.shape, layer.lora_up.shape)]
        places, size = _places(shapes)
        self.master = torch.zeros(size, device=device)
        self.compute = self.master if dtype == torch.float32 else torch.zeros(size, device=device, dtype=dtype)
        self.gradient = torch.zeros_like(self.compute)  # of the leaves; steps add to it
        factors = iter(self._factor(place, shape) for place, shape in zip(places, shapes, strict=True))
        self.layers = {name: LoraLayer(next(factors), next(factors), layer.alpha) for name, layer in start.items()}
        self.load(start)

    def _factor(self, place: int, shape: torch.Size) -> Factor:
        span = slice(place, place + math.prod(shape))
        leaf = _shaped(self.compute[span], shape).detach().requires_grad_()
        leaf.grad = _shaped(self.gradient[span], shape)
        return Factor(_shaped(self.master[span], shape), leaf)

    def refresh(self) -> None:
        """Brings the model's copy up to date after the float32 weights have changed."""
        if self.compute is not self.master:
            with torch.no_grad():
                self.compute.copy_(self.master)

    def load(self, layers: Mapping[str, Layer]) -> None:
        """Takes over the deltas of all layers; ranks below the adapter's own are filled up with zeros.

        Raises:
            KeyError: a layer of the adapter is missing.
        """
        with torch.no_grad():
            for name, branch in self.layers.items():
                layer = layers[name]
                branch.lora_down.zero_()[: layer.rank] = layer.lora_down
                branch.lora_up.zero_()[:, : layer.rank] = layer.lora_up * (layer.scale / branch.scale)
        self.refresh()

    def span(self, factor: Tensor) -> slice:
        """Where the numbers of a factor's master stand in the flat tensors."""
        begin = factor.storage_offset() - self.master.storage_offset()
        return slice(begin, begin + factor.numel())


def _places(shapes: Sequence[torch.Size]) -> tuple[list[int], int]:
    """Where each factor begins, and the length of all."""
    places, end = [], 0
    for shape in shapes:
        places.append(end)
        end += -(-math.prod(shape) // _ALIGNMENT) * _ALIGNMENT
    return places, end


def _shaped(numbers: Tensor, shape: torch.Size) -> Tensor:
    """A factor in a part of a flat tensor; of a convolution on pictures with channels last, as kernels read them."""
    if len(shape) != 4:
        return numbers.view(shape)
    features, channels, height, width = shape
    return numbers.view(features, height, width, channels).permute(0, 3, 1, 2)


def make_parameters(
    layers: Mapping[str, nn.Module],
    rank: int,
    alpha: float,
    generator: torch.Generator,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    ranks: Mapping[str, int] | None = None,
    strengths: Mapping[str, float] | None = None,
) -> FlatParameters:
    """A branch for each layer: lora_down uniform in ±1/√in from the generator (on the CPU), lora_up zero.

    A rank above a layer's size is cut to it there, and alpha with it, so that the scale stays. dtype: the type that
    the model computes in. ranks: of layers that get another, with the same scale. strengths: what alpha is multiplied
    by in some layers, which then learn so much slower or faster.

    Raises:
        ValueError: no layer is as large as the rank.
    """
    sizes = {name: _sizes(module) for name, module in layers.items()}
    largest = max(min(outputs, math.prod(inputs)) for outputs, inputs in sizes.values())
    if rank > largest:
        raise ValueError(
            f"The maximum rank is {rank}, but the model's largest layer can only have rank {largest}. "
            f"Set the maximum rank to {largest} or less."
        )
    start, cut = {}, 0
    for name, (outputs, inputs) in sizes.items():
        wanted = (ranks or {}).get(name, rank)
        kept = min(wanted, outputs, math.prod(inputs))
        cut += kept < wanted
        bound = 1 / math.sqrt(math.prod(inputs))
        down = (torch.rand(kept, *inputs, generator=generator) * 2 - 1) * bound
        up = torch.zeros(outputs, kept, *(1 for _ in inputs[1:]))
        start[name] = Layer(down, up, alpha * kept / rank * (strengths or {}).get(name, 1.0))
    if cut:
        log.info("AC-LoRA: %d of %d layers are smaller than rank %d and get their own size.", cut, len(layers), rank)
    return FlatParameters(start, device, dtype)


def _sizes(module: nn.Module) -> tuple[int, tuple[int, ...]]:
    """Output features, and input features with the kernel's sides behind them."""
    if is_linear(module):
        linear: Any = module
        return linear.out_features, (linear.in_features,)
    convolution: Any = module
    return convolution.out_channels, (convolution.in_channels, *convolution.kernel_size)
