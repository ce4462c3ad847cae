"""Batches, and the order in which a training sees its pictures: every one once in each epoch, alike ones together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .masks import joined_weights

if TYPE_CHECKING:
    from .model import Model

_SAMPLED_EPOCHS = 64


def steps_per_epoch(
    pictures: Iterable[int], groups: Sequence[Hashable], batch_size: int, accumulate: int = 1
) -> int:
    """How many steps it takes to see every one of the pictures once."""
    counts = Counter(groups[number] for number in pictures).values()
    whole = sum(count // (batch_size * accumulate) for count in counts)
    rests = [math.ceil(count % (batch_size * accumulate) / batch_size) for count in counts]
    return whole + len(_packed([rest for rest in rests if rest], accumulate))


def usual_steps_per_epoch(
    pictures: Sequence[int],
    groups: Sequence[Hashable],
    batch_size: int,
    accumulate: int = 1,
    variants: Mapping[int, Sequence[int]] | None = None,
) -> int:
    """How many steps an epoch takes; where variants go into other groups and it depends on the draw, the mean of some.
    """
    variants = variants or {}
    own = [variants.get(number) or [number] for number in pictures]
    if all(len({groups[number] for number in numbers}) == 1 for numbers in own):
        return steps_per_epoch(pictures, groups, batch_size, accumulate)
    generator = torch.Generator().manual_seed(0)
    counts = []
    for _ in range(_SAMPLED_EPOCHS):
        shown = [numbers[int(torch.randint(len(numbers), (), generator=generator))] for numbers in own]
        counts.append(steps_per_epoch(shown, groups, batch_size, accumulate))
    return round(sum(counts) / len(counts))


def _packed(sizes: Sequence[int], room: int) -> list[list[int]]:
    """The places of things of these sizes, put together so that no pack is larger than the room.

    The largest first, each into the first pack that has room, so that their number does not follow the order.
    """
    packs: list[list[int]] = []
    left: list[int] = []
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        fitting = next((number for number, space in enumerate(left) if space >= sizes[place]), None)
        if fitting is None:
            fitting = len(packs)
            packs.append([])
            left.append(room)
        packs[fitting].append(place)
        left[fitting] -= sizes[place]
    return packs


def alike(numbers: Iterable[int], groups: Sequence[Hashable], batch_size: int) -> list[list[int]]:
    """Batches of picture numbers of one group each, in the order in which they come."""
    members: dict[Hashable, list[int]] = {}
    for number in numbers:
        members.setdefault(groups[number], []).append(number)
    return [
        same[start : start + batch_size] for same in members.values() for start in range(0, len(same), batch_size)
    ]


def epoch_batches(
    pictures: Sequence[int],
    groups: Sequence[Hashable],
    batch_size: int,
    generator: torch.Generator,
    accumulate: int = 1,
) -> list[list[int]]:
    """One epoch: the picture numbers of each step, in an order drawn from the generator.

    groups: for each picture what it must have in common with the others of its batch (size, kind of caption). A group
    that does not fill its last batch gives a smaller one.

    accumulate: how many batches may go into a step; alike takes the step apart into them. As long as a group fills
    them, they are those of one batch so many times as large, so n × 1 is 1 × n. What is left of the groups comes
    together, since only the pictures of a batch must be alike: else a set in which each picture has its own size, or
    its own length of caption, would gain nothing.
    """
    order = torch.randperm(len(pictures), generator=generator).tolist()
    steps = alike([pictures[place] for place in order], groups, batch_size * accumulate)
    if accumulate > 1:
        steps = _rests_joined(steps, batch_size, accumulate)
    return [steps[place] for place in torch.randperm(len(steps), generator=generator).tolist()]


def _rests_joined(steps: list[list[int]], batch_size: int, accumulate: int) -> list[list[int]]:
    whole = [step for step in steps if len(step) == batch_size * accumulate]
    rests = [step for step in steps if len(step) < batch_size * accumulate]
    packs = _packed([math.ceil(len(rest) / batch_size) for rest in rests], accumulate)
    return whole + [[number for place in pack for number in rests[place]] for pack in packs]


class Order:
    """Epoch after epoch without end; next gives (epoch from 1, whether this step is its last, picture numbers)."""

    def __init__(
        self,
        pictures: Sequence[int],
        groups: Sequence[Hashable],
        batch_size: int,
        generator: torch.Generator,
        accumulate: int = 1,
        variants: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        self._pictures, self._groups, self._batch_size = pictures, groups, batch_size
        self._generator, self._accumulate, self._variants = generator, accumulate, variants or {}
        self._epoch = 0
        self._left: list[list[int]] = []  # steps of this epoch that are still to come

    def __iter__(self) -> Iterator[tuple[int, bool, list[int]]]:
        return self

    def __next__(self) -> tuple[int, bool, list[int]]:
        if not self._left:
            self._epoch += 1
            shown = [self._picked(number) for number in self._pictures]
            self._left = epoch_batches(shown, self._groups, self._batch_size, self._generator, self._accumulate)
        batch = self._left.pop(0)
        return self._epoch, not self._left, batch

    def _picked(self, picture: int) -> int:
        """One of a picture's variants, each as likely as the others."""
        variants = self._variants.get(picture, ())
        if len(variants) < 2:
            return picture
        return variants[int(torch.randint(len(variants), (), generator=self._generator))]

    def state_dict(self) -> dict[str, Any]:
        """Where it stands; the generator, which others may draw from too, is not part of it."""
        return {"epoch": self._epoch, "left": [list(batch) for batch in self._left]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from where another one stood."""
        self._epoch, self._left = int(state["epoch"]), [list(batch) for batch in state["left"]]


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
    key = (model.groups[pictures[0]], len(pictures))
    positions = joined_weights(model, pictures, mask_floor)
    return Batch(latents, noise, sigma, weights, model.condition(pictures), key, loss_weight, learned, positions)
