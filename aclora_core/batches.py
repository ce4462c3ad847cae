"""Batches, and the order in which a training sees its pictures: every one once in each epoch, alike ones together."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .masks import joined_weights

if TYPE_CHECKING:
    from .model import Model


def steps_per_epoch(pictures: int, batch_size: int, accumulate: int = 1) -> int:
    """How many steps it takes to see so many pictures once."""
    return math.ceil(pictures / (batch_size * accumulate))


def alike(numbers: Iterable[int], groups: Sequence[Hashable], batch_size: int) -> list[list[int]]:
    """Batches of picture numbers of one group each, in the order in which they come."""
    members: dict[Hashable, list[int]] = {}
    for number in numbers:
        members.setdefault(groups[number], []).append(number)
    return [
        same[start : start + batch_size] for same in members.values() for start in range(0, len(same), batch_size)
    ]


def parts(step: Sequence[int], groups: Sequence[Hashable], batch_size: int) -> list[list[int]]:
    """The batches that a step's pictures go through the model in, each of one group.

    Where a step is of several groups, a batch that is not full has a power of two: a CUDA graph is recorded for every
    number of rows of every group, and so there are few.
    """
    batches = alike(step, groups, batch_size)
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
    batches = alike([pictures[place] for place in order], groups, size)
    steps = [batch for batch in batches if len(batch) == size]
    rest = [number for batch in batches if len(batch) < size for number in batch]
    steps += [rest[start : start + size] for start in range(0, len(rest), size)]
    return [steps[place] for place in torch.randperm(len(steps), generator=generator).tolist()]


class Order:
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


def largest_batch(pictures: Sequence[int], model: Model, batch_size: int) -> tuple[int, int]:
    """Rows of the batch with the most numbers in it, and one of its pictures; any variants of them may meet."""
    members: dict[Hashable, list[int]] = {}  # one variant of each picture that may be in the group
    for picture in pictures:
        for group, number in {model.groups[n]: n for n in model.variants.get(picture, (picture,))}.items():
            members.setdefault(group, []).append(number)
    batches = [same[:batch_size] for same in members.values()]
    largest = max(batches, key=lambda batch: len(batch) * model.latents[batch[0]].numel())
    return len(largest), largest[0]


@dataclass(frozen=True)
class Batch:
    """What goes through the model at once. Every tensor has one row for each picture."""

    latents: Tensor  # (n, channels, ...)
    noise: Tensor  # of the same shape
    sigma: Tensor  # (n,), noise levels
    weight: Tensor  # (n,), of each picture in the loss of its step
    condition: Any  # what the model wants besides: tensors in nested dictionaries and lists
    key: Hashable  # alike for batches that differ in the values of their tensors only
    pictures: Sequence[int] = ()  # their numbers
    loss_weight: Tensor | None = None  # (n,), of each noise level, in what is learned and not in the loss that is told
    learned: Tensor | None = None  # (n,), of each picture in what is learned, where that is not its weight
    positions: Tensor | None = None  # (n, 1, ..., h, w), of each place of the latents; their mean in a picture is 1


def make_batch(
    model: Model,
    pictures: Sequence[int],
    noise: Tensor,
    sigma: Tensor,
    weight: float | Tensor,
    loss_weight: Tensor | None = None,
    learned: Tensor | None = None,
    mask_floor: float = 0.0,
) -> Batch:
    """A batch of pictures of one group, each with its own noise and noise level.

    weight: of every picture, or (n,) of each. mask_floor: what counts where a mask is black.
    """
    latents = torch.cat([model.latents[number] for number in pictures])
    weights = weight if isinstance(weight, Tensor) else torch.full((len(pictures),), weight)
    positions = joined_weights(model, pictures, mask_floor)
    key, condition = _key(model, pictures), model.condition(pictures)
    return Batch(latents, noise, sigma, weights, condition, key, pictures, loss_weight, learned, positions)


def _key(model: Model, pictures: Sequence[int]) -> Hashable:
    return model.groups[pictures[0]], len(pictures)


def split(model: Model, batch: Batch, rows: int) -> list[Batch]:
    """The same pictures at most so many at a time, and weighing as before; the batch itself where it has no more."""
    if len(batch.pictures) <= rows:
        return [batch]
    return [_part(model, batch, slice(start, start + rows)) for start in range(0, len(batch.pictures), rows)]


def _part(model: Model, batch: Batch, rows: slice) -> Batch:
    pictures = batch.pictures[rows]
    names = ("latents", "noise", "sigma", "weight", "loss_weight", "learned", "positions")
    tensors = {name: tensor[rows] for name in names if (tensor := getattr(batch, name)) is not None}
    return replace(batch, pictures=pictures, key=_key(model, pictures), condition=model.condition(pictures), **tensors)
