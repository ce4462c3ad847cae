"""The order in which a training sees its images: each once per epoch, images of one batch key together."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..diffusion import TrainingSet


def steps_per_epoch(images: int, batch_size: int, accumulate: int = 1) -> int:
    """Return how many steps it takes to see all images once."""
    return math.ceil(images / (batch_size * accumulate))


def images_per_step(images: int, batch_size: int, accumulate: int = 1) -> int:
    """Return how many images a step takes, at most."""
    return min(images, batch_size * accumulate)


def style_indices(images: TrainingSet, indices: Iterable[int]) -> list[int]:
    """Return the indices of images that show the style; the others are regularisation images."""
    return [index for index in indices if index not in images.regularisation]


def captioned_indices(images: TrainingSet) -> list[int]:
    """Return the index of every image, the first of its variants; not that of its empty caption, nor of a prompt."""
    others = {*images.without_caption.values(), *images.prompts}
    return [index for index in images.variants or range(len(images.latents)) if index not in others]


def group_by_key(indices: Iterable[int], batch_keys: Sequence[Hashable], batch_size: int) -> list[list[int]]:
    """Return batches of at most batch_size indices with one batch key each, in the order in which they come."""
    members: dict[Hashable, list[int]] = {}
    for index in indices:
        members.setdefault(batch_keys[index], []).append(index)
    return [
        group[start : start + batch_size] for group in members.values() for start in range(0, len(group), batch_size)
    ]


def micro_batches(
    step: Sequence[int], batch_keys: Sequence[Hashable], batch_size: int, own: Sequence[int] | None = None
) -> list[list[int]]:
    """Split the indices of a step into micro-batches, each with one batch key.

    Where a step mixes batch keys, a micro-batch that is not full holds a power of two of images: a CUDA graph is
    captured for each number of rows of each key, and this keeps their number small.

    Args:
        step: the indices of the step.
        batch_keys: of all images.
        batch_size: rows of a micro-batch, at most.
        own: those that this process takes; None for all.
    """
    batches = group_by_key(step if own is None else own, batch_keys, batch_size)
    if len({batch_keys[index] for index in step}) == 1:
        return batches
    parts: list[list[int]] = []
    for batch in batches:
        parts += [batch] if len(batch) == batch_size else _powers_of_two(batch)
    return parts


def _powers_of_two(indices: list[int]) -> Iterator[list[int]]:
    while indices:
        count = 1 << (len(indices).bit_length() - 1)
        yield indices[:count]
        indices = indices[count:]


def epoch_steps(
    indices: Sequence[int], batch_keys: Sequence[Hashable], size: int, generator: torch.Generator
) -> list[list[int]]:
    """Return the indices of each step of one epoch, in an order drawn from the generator.

    While a batch key has enough images to fill a step, they fill it alone, which is fastest; the remaining images of
    all keys share steps. So every image counts alike, whatever its size, and only one step may have fewer than `size`
    images.
    """
    order = torch.randperm(len(indices), generator=generator).tolist()
    batches = group_by_key([indices[position] for position in order], batch_keys, size)
    steps = [batch for batch in batches if len(batch) == size]
    rest = [index for batch in batches if len(batch) < size for index in batch]
    steps += [rest[start : start + size] for start in range(0, len(rest), size)]
    return [steps[position] for position in torch.randperm(len(steps), generator=generator).tolist()]


class EpochSampler:
    """Endless epochs. Each item is (epoch, counted from 1; whether this step ends it; the indices of the step)."""

    def __init__(
        self,
        indices: Sequence[int],
        batch_keys: Sequence[Hashable],
        size: int,
        generator: torch.Generator,
        variants: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        self._indices = indices
        self._batch_keys = batch_keys
        self._size = size
        self._generator = generator
        self._variants = variants or {}
        self._epoch = 0
        self._remaining: list[list[int]] = []  # steps of this epoch that are still to come

    def __iter__(self) -> Iterator[tuple[int, bool, list[int]]]:
        return self

    def __next__(self) -> tuple[int, bool, list[int]]:
        if not self._remaining:
            self._epoch += 1
            shown = [self._pick_variant(index) for index in self._indices]
            self._remaining = epoch_steps(shown, self._batch_keys, self._size, self._generator)
        step = self._remaining.pop(0)
        return self._epoch, not self._remaining, step

    def _pick_variant(self, index: int) -> int:
        """Return one of an image's augmented versions, each as likely as the others."""
        variants = self._variants.get(index, ())
        if len(variants) < 2:
            return index
        return variants[int(torch.randint(len(variants), (), generator=self._generator))]

    def state_dict(self) -> dict[str, Any]:
        """Return its position; the generator, which others draw from too, is not part of it."""
        return {"epoch": self._epoch, "left": [list(step) for step in self._remaining]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved position."""
        self._epoch = int(state["epoch"])
        self._remaining = [list(step) for step in state["left"]]
