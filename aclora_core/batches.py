"""Batches, and the order in which a training sees its pictures: every one once in each epoch, alike ones together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .model import Model


def steps_per_epoch(pictures: Iterable[int], groups: Sequence[Hashable], batch_size: int) -> int:
    """How many batches it takes to see every one of the pictures once."""
    return sum(math.ceil(count / batch_size) for count in Counter(groups[number] for number in pictures).values())


def alike(numbers: Iterable[int], groups: Sequence[Hashable], batch_size: int) -> list[list[int]]:
    """Batches of picture numbers of one group each, in the order in which they come."""
    members: dict[Hashable, list[int]] = {}
    for number in numbers:
        members.setdefault(groups[number], []).append(number)
    return [
        same[start : start + batch_size] for same in members.values() for start in range(0, len(same), batch_size)
    ]


def epoch_batches(
    pictures: Sequence[int], groups: Sequence[Hashable], batch_size: int, generator: torch.Generator
) -> list[list[int]]:
    """One epoch: batches of picture numbers, in an order drawn from the generator.

    groups: for each picture what it must have in common with the others of its batch (size, kind of caption). A group
    that does not fill its last batch gives a smaller one.
    """
    order = torch.randperm(len(pictures), generator=generator).tolist()
    batches = alike([pictures[place] for place in order], groups, batch_size)
    return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]


def endless_batches(
    pictures: Sequence[int], groups: Sequence[Hashable], batch_size: int, generator: torch.Generator
) -> Iterator[tuple[int, bool, list[int]]]:
    """Epoch after epoch without end: (epoch from 1, whether this batch is its last, picture numbers)."""
    epoch = 0
    while True:
        epoch += 1
        batches = epoch_batches(pictures, groups, batch_size, generator)
        for place, batch in enumerate(batches, start=1):
            yield epoch, place == len(batches), batch


def largest_batch(pictures: Sequence[int], model: Model, batch_size: int) -> tuple[int, int]:
    """Rows of the batch with the most numbers in it, and one of its pictures."""
    batches = alike(pictures, model.groups, batch_size)
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


def make_batch(model: Model, pictures: Sequence[int], noise: Tensor, sigma: Tensor, weight: float) -> Batch:
    """A batch of pictures of one group, each with its own noise and noise level."""
    latents = torch.cat([model.latents[number] for number in pictures])
    weights = torch.full((len(pictures),), weight)
    key = (model.groups[pictures[0]], len(pictures))
    return Batch(latents, noise, sigma, weights, model.condition(pictures), key)
