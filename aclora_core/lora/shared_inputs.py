"""Fused computation of linear layers that share an input, such as the query, key and value projections.

It shares the cost of a launch, fills the GPU better, and sums the gradients of the input where they are computed.
Groups are discovered during the first forward pass, as nothing in a model declares them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import Tensor

from ..acceleration import MAX_LAYERS
from .linear import AdaptedLayer, adapted_linears


class SharedInputs:
    """The adapted linear layers of one module, and which of them share an input.

    Until fuse is called each layer is computed by itself, and layers called with one and the same tensor are recorded.
    Afterwards the first of them to be called computes all; the others' outputs are cached until they are called with
    that tensor. The groups do not change any more, since a recomputed block must compute exactly what it did before.
    """

    def __init__(self) -> None:
        self._layers: list[AdaptedLayer] = []
        self._seen: dict[int, list[int]] = {}  # leader -> layers that were called with the leader's input
        self._followers: dict[int, list[int]] = {}  # leader -> layers that are computed along with it
        self._leader = -1  # index of the layer that was called first with the current input
        self._input: Callable[[], Tensor | None] = lambda: None  # weak reference to the current input
        self._version = 0  # of the current input, to notice in-place changes
        self._cached: dict[int, Tensor] = {}  # outputs for the current input, by layer

    def add(self, layer: AdaptedLayer) -> Callable[[Tensor], Tensor]:
        """Add a layer, and return its forward."""
        index = len(self._layers)
        self._layers.append(layer)
        return lambda x: self._forward(index, x)

    def fuse(self) -> None:
        """Compute layers together from now on that have shared an input so far."""
        self._followers = {leader: indices[: MAX_LAYERS - 1] for leader, indices in self._seen.items()}

    def _forward(self, index: int, x: Tensor) -> Tensor:
        if len(self._layers) == 1 or x.is_inference():  # inference tensors have no version to notice changes by
            return adapted_linears(x, [self._layers[index]])[0]
        if self._input() is not x or self._version != x._version or index == self._leader:
            return self._lead(index, x)
        if index in self._cached:
            return self._cached.pop(index)
        seen = self._seen.setdefault(self._leader, [])
        if index not in seen and self._layers[index].kind == self._layers[self._leader].kind:
            seen.append(index)
        return adapted_linears(x, [self._layers[index]])[0]

    def _lead(self, index: int, x: Tensor) -> Tensor:
        """Compute the first layer of an input together with its followers, whose outputs are cached."""
        self._leader = index
        self._input = weakref.ref(x)
        self._version = x._version
        followers = self._followers.get(index, [])
        output, *others = adapted_linears(x, [self._layers[each] for each in (index, *followers)])
        self._cached = dict(zip(followers, others, strict=True))
        return output
