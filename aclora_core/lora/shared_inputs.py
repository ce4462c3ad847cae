"""Linear layers of one module that read the same tensor, such as those of queries, keys and values.

They are computed together, which shares what a launch costs, fills the GPU better and adds up what they give back to
the tensor where it is computed. Nothing says beforehand which layers they are; it is seen as the module runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import Tensor

from ..acceleration import MAX_LAYERS
from .linear import AdaptedLayer, adapted_linears


class SharedInputs:
    """The adapted linear layers of one module.

    At first each is computed alone. From join on, a layer that others were seen to follow, called with its very tensor,
    is computed along with them, and their outputs wait until they are asked for. Which these are does not change any
    more, since what is computed twice must be computed alike.
    """

    def __init__(self) -> None:
        self._layers: list[AdaptedLayer] = []
        self._seen: dict[int, list[int]] = {}  # those that were called with the tensor of another, by its number
        self._followers: dict[int, list[int]] = {}
        self._first = -1
        self._read: Callable[[], Tensor | None] = lambda: None  # what the first was called with, while it lives
        self._version = 0
        self._waiting: dict[int, Tensor] = {}

    def add(self, layer: AdaptedLayer) -> Callable[[Tensor], Tensor]:
        """The forward of a further layer."""
        number = len(self._layers)
        self._layers.append(layer)
        return lambda x: self._output(number, x)

    def join(self) -> None:
        """Has those computed together that have read the same tensor so far."""
        self._followers = {first: numbers[: MAX_LAYERS - 1] for first, numbers in self._seen.items()}

    def _output(self, number: int, x: Tensor) -> Tensor:
        if len(self._layers) == 1 or x.is_inference():  # such a tensor does not tell whether it was changed
            return adapted_linears(x, [self._layers[number]])[0]
        if self._read() is not x or self._version != x._version or number == self._first:
            return self._begin(number, x)
        if number in self._waiting:
            return self._waiting.pop(number)
        seen = self._seen.setdefault(self._first, [])
        if number not in seen and self._layers[number].kind == self._layers[self._first].kind:
            seen.append(number)
        return adapted_linears(x, [self._layers[number]])[0]

    def _begin(self, number: int, x: Tensor) -> Tensor:
        self._first, self._read, self._version = number, weakref.ref(x), x._version
        followers = self._followers.get(number, [])
        output, *others = adapted_linears(x, [self._layers[each] for each in (number, *followers)])
        self._waiting = dict(zip(followers, others, strict=True))
        return output
