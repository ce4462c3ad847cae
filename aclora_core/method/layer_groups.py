"""Factors of LoRA layers, stacked by shape, so that a GPU gets few large operations instead of many small ones.

Layers of one rank form a group. Operations on rank × rank matrices run for the whole group at once. Operations on the
factors themselves run stack by stack: a stack holds factors of one shape and type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .batched_eigh import to_float64

# Layer name -> (lora_down, lora_up, scale).
Layers = Mapping[str, tuple[Tensor, Tensor, float]]


# A stack holds at most this many elements (128 MiB in float64), so that training memory stays free.
CHUNK = 1 << 24


class Stack(NamedTuple):
    """Factors of one shape and type."""

    factors: list[Tensor]
    positions: slice  # of these factors among all stacked factors of their side

    def matrices(self, is_up: bool) -> Tensor:
        """Return the factors as matrices (n, rank, width) in float64: lora_down, or the transpose of lora_up.

        They are stacked first and converted together: one kernel per layer would cost more on a GPU.
        """
        stacked = torch.stack(self.factors).flatten(2)
        return to_float64(stacked.mT if is_up else stacked)

    def write(self, matrices: Tensor, is_up: bool) -> None:
        """Copy matrices (n, rank, width) into the factors."""
        new = (matrices.mT if is_up else matrices).to(self.factors[0]).contiguous()
        torch._foreach_copy_(self.factors, list(new.view(-1, *self.factors[0].shape).unbind()))


class Side(NamedTuple):
    """All lora_down of a group, or all its lora_up."""

    stacks: list[Stack]
    order: Tensor  # (n,), index of the layer at each position of the stacks
    inverse_order: Tensor  # (n,), position of each layer in the stacks
    is_up: bool
    widths: Tensor  # (n,), float64: columns of each layer's matrix

    def map_matrices(self, function: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Apply a function to the matrices of each stack, and return its results for all layers, in layer order."""
        return self.map_stacks(lambda stack: function(stack.matrices(self.is_up)))

    def map_stacks(self, function: Callable[[Stack], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Apply a function to each stack, and return its results for all layers, in layer order."""
        parts = [function(stack) for stack in self.stacks]
        return tuple(torch.cat(column)[self.inverse_order] for column in zip(*parts, strict=True))


class Group(NamedTuple):
    """Layers of one rank that also agree in their numbers of singular values."""

    names: list[str]
    down: Side
    up: Side
    scales: Tensor  # (n,), float64, absolute values
    spectrum_sizes: tuple[int, int, int]  # number of singular values of lora_down, of lora_up and of the delta


def group_layers(layers: Layers) -> Iterator[Group]:
    """Yield the layers in groups, each in the order of the input."""
    names_of: dict[tuple[int, int, int, torch.device], list[str]] = {}
    for name, (down, up, _) in layers.items():
        rank, outputs, inputs = down.shape[0], up.shape[0], down.shape[1:].numel()
        names_of.setdefault((rank, min(rank, inputs), min(rank, outputs), down.device), []).append(name)
    for (_, down_size, up_size, _), names in names_of.items():
        downs, ups, scales = zip(*(layers[name] for name in names), strict=True)
        down_side = _make_side(downs, is_up=False)
        up_side = _make_side(ups, is_up=True)
        sizes = down_size, up_size, min(down_size, up_size)
        absolute_scales = down_side.widths.new_tensor(scales).abs()
        yield Group(names, down_side, up_side, absolute_scales, sizes)


def _make_side(factors: Sequence[Tensor], is_up: bool) -> Side:
    """Stack the factors by shape and type, in chunks of at most CHUNK elements."""
    indices_of: dict[tuple[object, ...], list[int]] = {}
    for index, factor in enumerate(factors):
        indices_of.setdefault((factor.shape, factor.dtype), []).append(index)
    stacks, order = list[Stack](), list[int]()
    for indices in indices_of.values():
        step = max(1, CHUNK // factors[indices[0]].numel())
        for start in range(0, len(indices), step):
            part = indices[start : start + step]
            positions = slice(len(order), len(order) + len(part))
            stacks.append(Stack([factors[index] for index in part], positions))
            order += part
    device = to_float64(factors[0][:0]).device
    ordered = torch.tensor(order)
    widths = [float(factor.shape[0] if is_up else factor.shape[1:].numel()) for factor in factors]
    return Side(
        stacks,
        ordered.to(device),
        ordered.argsort().to(device),
        is_up,
        torch.tensor(widths, dtype=torch.float64, device=device),
    )
