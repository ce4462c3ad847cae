"""The factors of an adapter's layers, stacked by shape, so that a GPU gets few and large things to do.

Layers of one rank form a group: what is done on rank × rank matrices is done for the whole group at once. What needs
the factors themselves goes through the group's lora_downs, and through its lora_ups, stack by stack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .batched_eigh import to_float64

Layers = Mapping[str, tuple[Tensor, Tensor, float]]


# Factors of one shape are stacked in float64 up to this many numbers (128 MiB), so that training memory stays free.
CHUNK = 1 << 24


class Stack(NamedTuple):
    """Factors of one shape and type, and their places among all of their side."""

    factors: list[Tensor]
    places: slice

    def matrices(self, is_up: bool) -> Tensor:
        """(n, rank, width), float64: lora_down, or the transpose of lora_up.

        They are stacked as they are and made float64 together: on a GPU, one kernel for each layer would cost more.
        """
        stacked = torch.stack(self.factors).flatten(2)
        return to_float64(stacked.mT if is_up else stacked)

    def write(self, matrices: Tensor, is_up: bool) -> None:
        """Copies the matrices (n, rank, width) back into the factors."""
        new = (matrices.mT if is_up else matrices).to(self.factors[0]).contiguous()
        torch._foreach_copy_(self.factors, list(new.view(-1, *self.factors[0].shape).unbind()))


class Side(NamedTuple):
    """The lora_downs of a group, or its lora_ups."""

    stacks: list[Stack]
    order: Tensor  # the layer at each place of the stacks
    back: Tensor  # the place of each layer
    is_up: bool
    widths: Tensor  # (n,), float64: columns of each layer's matrix

    def gather(self, function: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What the function makes of the matrices of each stack, for all layers, in their order."""
        return self.gather_with(lambda stack: function(stack.matrices(self.is_up)))

    def gather_with(self, function: Callable[[Stack], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """gather for a function that takes the stack itself."""
        parts = [function(stack) for stack in self.stacks]
        return tuple(torch.cat(column)[self.back] for column in zip(*parts, strict=True))


class Group(NamedTuple):
    """Layers of one rank, and with one number of singular values in lora_down, one in lora_up and one in the delta."""

    names: list[str]
    down: Side
    up: Side
    scales: Tensor  # (n,), float64, none negative
    counts: tuple[int, int, int]  # of singular values in lora_down, lora_up and the delta


def groups(layers: Layers) -> Iterator[Group]:
    """The layers in groups, each in the order that they came in."""
    found: dict[tuple[int, int, int, torch.device], list[str]] = {}
    for name, (down, up, _) in layers.items():
        rank, outputs, inputs = down.shape[0], up.shape[0], down.shape[1:].numel()
        found.setdefault((rank, min(rank, inputs), min(rank, outputs), down.device), []).append(name)
    for (_, in_down, in_up, _), names in found.items():
        downs, ups, scales = zip(*(layers[name] for name in names), strict=True)
        side = _side(downs, is_up=False)
        sizes = side.widths.new_tensor(scales).abs()
        yield Group(names, side, _side(ups, is_up=True), sizes, (in_down, in_up, min(in_down, in_up)))


def _side(factors: Sequence[Tensor], is_up: bool) -> Side:
    shapes: dict[tuple[object, ...], list[int]] = {}
    for place, factor in enumerate(factors):
        shapes.setdefault((factor.shape, factor.dtype), []).append(place)
    stacks, order, widths = list[Stack](), list[int](), [0.0] * len(factors)
    for places in shapes.values():
        first = factors[places[0]]
        step = max(1, CHUNK // first.numel())
        for start in range(0, len(places), step):
            part = places[start : start + step]
            stacks.append(Stack([factors[place] for place in part], slice(len(order), len(order) + len(part))))
            order += part
        for place in places:
            widths[place] = float(first.shape[0] if is_up else first.shape[1:].numel())
    device = to_float64(factors[0][:0]).device
    ordered = torch.tensor(order)
    return Side(
        stacks,
        ordered.to(device),
        ordered.argsort().to(device),
        is_up,
        torch.tensor(widths, dtype=torch.float64, device=device),
    )
