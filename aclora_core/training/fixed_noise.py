"""Losses of images at fixed noise.

Noise and noise levels are the same in every measurement, so two measurements differ by the adapter alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from ..acceleration import CudaGraphRunner
from ..diffusion import Batch, DiffusionModel, TrainingSet, denoising_losses
from ..distributed import ALONE, Processes
from .batches import make_batch
from .sampler import group_by_key

NOISE_FRACTIONS = (0.15, 0.35, 0.55, 0.75)  # between clean and noise; their mean stands for all levels


class FixedNoiseImages:
    """Images at four fixed noise levels each; an image's noise follows from the seed and its index alone.

    Several processes share the batches among them.
    """

    def __init__(
        self,
        model: DiffusionModel,
        images: TrainingSet,
        indices: Sequence[int],
        seed: int,
        batch_size: int = 16,
        graphs: CudaGraphRunner | None = None,
        mask_floor: float = 0.0,
        processes: Processes = ALONE,
    ) -> None:
        self.processes = processes
        self.model, self.images, self.indices = model, images, list(indices)
        self._seed, self._batch_size, self._mask_floor = seed, batch_size, mask_floor
        self._rows = batch_size  # images that go through the model at a time
        self._graphs = graphs or CudaGraphRunner(model.device, enabled=False)

    @cached_property
    def _batches(self) -> list[list[Batch]]:
        """The images level by level, in batches that several processes share, each in parts that fit the model.

        Made when they are first measured; all levels share an image's conditioning.
        """
        keys = self.images.batch_keys
        groups = group_by_key(self.indices, keys, self._batch_size)
        with torch.no_grad():  # else the history of text encoders that learn would live as long as this set
            first = [[self._first_level(part) for part in group_by_key(group, keys, self._rows)] for group in groups]
        batches = list(first)
        for level in range(1, len(NOISE_FRACTIONS)):
            batches += [[self._at_level(part, level) for part in parts] for parts in first]
        return batches

    def _first_level(self, indices: Sequence[int]) -> Batch:
        return make_batch(self.images, indices, *self._noise(indices, 0), mask_floor=self._mask_floor)

    def _at_level(self, batch: Batch, level: int) -> Batch:
        noise, sigma = self._noise(batch.indices, level)
        return replace(batch, noise=noise, sigma=sigma)

    def limit(self, rows: int) -> None:
        """Send at most so many images through the model at a time. Each of several processes has a limit of its own."""
        rows = min(rows, self._batch_size)
        if rows != self._rows:
            self._rows = rows
            vars(self).pop("_batches", None)

    def _noise(self, indices: Sequence[int], level: int) -> tuple[Tensor, Tensor]:
        """Return the noise of images with one batch key at a level, (n, channels, ...), and its noise levels, (n,)."""
        rows = []
        for index in indices:
            generator = torch.Generator().manual_seed((self._seed * 1_000_003 + index * 31 + level) % 2**63)
            rows.append(torch.randn(self.images.latents[index].shape, generator=generator))
        return torch.cat(rows), torch.full((len(rows),), self.model.objective.sigma_at(NOISE_FRACTIONS[level]))

    def losses(self) -> Tensor:
        """Return the loss of each image at each level, float64 on the CPU, always in the same order."""
        return self.collect(list(self.iterate_losses()))

    def collect(self, own: Sequence[Tensor]) -> Tensor:
        """Return the losses of all images from those that each process has measured, always in the same order."""
        shares = self.processes.gather(own)
        rounds = max(map(len, shares))
        return torch.cat([share[place] for place in range(rounds) for share in shares if place < len(share)])

    def iterate_losses(self) -> Iterator[Tensor]:
        """Yield the losses of this process's batches, batch by batch."""
        for parts in self._batches[self.processes.rank :: self.processes.size]:
            yield torch.cat([self._losses_of(part) for part in parts])

    def _losses_of(self, batch: Batch) -> Tensor:
        if self.model.text_encoders:  # they may have learned since
            with torch.no_grad():
                batch = replace(batch, conditioning=self.images.conditioning(batch.indices))
        return self._graphs.call(self._batch_losses, batch, batch.key).cpu().double()  # there, as MPS has no float64

    def _batch_losses(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            return denoising_losses(self.model, batch)


def mean_denoising_loss(
    model: DiffusionModel, images: TrainingSet, indices: Sequence[int], seed: int, batch_size: int = 16
) -> float:
    """Return the mean loss of the model as it is over images at fixed noise."""
    return float(FixedNoiseImages(model, images, indices, seed, batch_size).losses().mean())
