"""The order in which a training sees its pictures: every one once in each epoch, and only alike ones in a batch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence

import torch


def steps_per_epoch(groups: Sequence[Hashable], batch_size: int) -> int:
    """How many batches it takes to see every picture once."""
    return sum(math.ceil(count / batch_size) for count in Counter(groups).values())


def alike(numbers: Iterable[int], groups: Sequence[Hashable], batch_size: int) -> list[list[int]]:
    """Batches of picture numbers of one group each, in the order in which they come."""
    members: dict[Hashable, list[int]] = {}
    for number in numbers:
        members.setdefault(groups[number], []).append(number)
    return [
        same[start : start + batch_size] for same in members.values() for start in range(0, len(same), batch_size)
    ]


def epoch_batches(groups: Sequence[Hashable], batch_size: int, generator: torch.Generator) -> list[list[int]]:
    """One epoch: batches of picture numbers, in an order drawn from the generator.

    groups: for each picture what it must have in common with the others of its batch (size, kind of caption). A group
    that does not fill its last batch gives a smaller one.
    """
    batches = alike(torch.randperm(len(groups), generator=generator).tolist(), groups, batch_size)
    return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]


def endless_batches(
    groups: Sequence[Hashable], batch_size: int, generator: torch.Generator
) -> Iterator[tuple[int, bool, list[int]]]:
    """Epoch after epoch without end: (epoch from 1, whether this batch is its last, picture numbers)."""
    epoch = 0
    while True:
        epoch += 1
        batches = epoch_batches(groups, batch_size, generator)
        for place, batch in enumerate(batches, start=1):
            yield epoch, place == len(batches), batch
