"""Batches, and the order in which a training sees its pictures: every one once in each epoch, alike ones together."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ..diffusion import Model


def steps_per_epoch(pictures: int, batch_size: int, accumulate: int = 1) -> int:
    """How many steps it takes to see so many pictures once."""
    return math.ceil(pictures / (batch_size * accumulate))


def group_by_key(numbers: Iterable[int], groups: Sequence[Hashable], batch_size: int) -> list[list[int]]:
    """Batches of picture numbers of one group each, in the order in which they come."""
    members: dict[Hashable, list[int]] = {}
    for number in numbers:
        members.setdefault(groups[number], []).append(number)
    return [same[start : start + batch_size] for same in members.values() for start in range(0, len(same), batch_size)]


def micro_batches(step: Sequence[int], groups: Sequence[Hashable], batch_size: int) -> list[list[int]]:
    """The batches that a step's pictures go through the model in, each of one group.

    Where a step is of several groups, a batch that is not full has a power of two: a CUDA graph is recorded for every
    number of rows of every group, and so there are few.
    """
    batches = group_by_key(step, groups, batch_size)
    if len({groups[number] for number in step}) == 1:
        return batches
    return [part for batch in batches for part in ([batch] if len(batch) == batch_size else _powers_of_two(batch))]


def _powers_of_two(numbers: list[int]) -> Iterator[list[int]]:
    while numbers:
        count = 1 << (len(numbers).bit_length() - 1)
        yield numbers[:count]
        numbers = numbers[count:]


def epoch_steps(
    pictures: Sequence[int], groups: Sequence[Hashable], size: int, generator: torch.Generator
) -> list[list[int]]:
    """One epoch: the picture numbers of each step, in an order drawn from the generator.

    groups: for each picture what it must have in common with the others of its batch (size, kind of caption). size:
    pictures in a step; only the one step that is left over may have fewer. As long as a group fills a step, it fills it
    alone, which is quickest; what is left of the groups shares steps. So every picture counts alike, whatever its size.
    """
    order = torch.randperm(len(pictures), generator=generator).tolist()
    batches = group_by_key([pictures[place] for place in order], groups, size)
    steps = [batch for batch in batches if len(batch) == size]
    rest = [number for batch in batches if len(batch) < size for number in batch]
    steps += [rest[start : start + size] for start in range(0, len(rest), size)]
    return [steps[place] for place in torch.randperm(len(steps), generator=generator).tolist()]


class EpochSampler:
    """Epoch after epoch without end; next gives (epoch from 1, whether this step is its last, picture numbers)."""

    def __init__(
        self,
        pictures: Sequence[int],
        groups: Sequence[Hashable],
        size: int,
        generator: torch.Generator,
        variants: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        self._pictures, self._groups, self._size = pictures, groups, size
        self._generator, self._variants = generator, variants or {}
        self._epoch = 0
        self._left: list[list[int]] = []  # steps of this epoch that are still to come

    def __iter__(self) -> Iterator[tuple[int, bool, list[int]]]:
        return self

    def __next__(self) -> tuple[int, bool, list[int]]:
        if not self._left:
            self._epoch += 1
            shown = [self._picked(number) for number in self._pictures]
            self._left = epoch_steps(shown, self._groups, self._size, self._generator)
        step = self._left.pop(0)
        return self._epoch, not self._left, step

    def _picked(self, picture: int) -> int:
        """One of a picture's variants, each as likely as the others."""
        variants = self._variants.get(picture, ())
        if len(variants) < 2:
            return picture
        return variants[int(torch.randint(len(variants), (), generator=self._generator))]

    def state_dict(self) -> dict[str, Any]:
        """Where it stands; the generator, which others may draw from too, is not part of it."""
        return {"epoch": self._epoch, "left": [list(step) for step in self._left]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from where another one stood."""
        self._epoch, self._left = int(state["epoch"]), [list(step) for step in state["left"]]


def style_indices(model: Model, pictures: Iterable[int]) -> list[int]:
    """Those that show the style; the others are regularisation pictures."""
    return [number for number in pictures if number not in model.regularisation]
