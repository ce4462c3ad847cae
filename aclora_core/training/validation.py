"""Losses of images at fixed noise; with held-out images the best step by them, and early stopping.

Noise and noise levels are the same in every measurement, so two measurements differ by the adapter alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..acceleration import CudaGraphRunner
from ..diffusion import Batch, DiffusionModel, TrainingSet, denoising_losses
from ..distributed import ALONE, Processes
from ..lora import FlatParameters
from .batches import make_batch
from .sampler import group_by_key, style_indices

NOISE_FRACTIONS = (0.15, 0.35, 0.55, 0.75)  # between clean and noise; their mean stands for all levels
MIN_IMAGES = 8  # with fewer, each is worth more to the training than to the validation
MAX_HELD_OUT = 12  # more would only be measured more rarely

# A forward pass alone takes some 40 % of a step on the same images. A measurement comes when 25 times its cost has been
# spent on steps, which leaves it 4 % of the time.
_STEPS_PER_PASS = 0.4 * 25
_PATIENCE = 3  # measurements


class ValidationSet:
    """Held-out images, each at four fixed noise levels; an image's noise follows from the seed and its index alone.

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
    return float(ValidationSet(model, images, indices, seed, batch_size).losses().mean())


def hold_out(images: TrainingSet, indices: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split images into (those to train on, those held out), drawn by the seed.

    Copies of an image are never on both sides. Nothing is held out of fewer than eight different images, or where the
    fraction is 0. Regularisation images are neither counted nor held out, as they do not belong to the style.
    """
    if fraction == 0:
        return list(indices), []
    different = different_images(images, style_indices(images, indices))
    if len(different) < MIN_IMAGES:
        return list(indices), []
    count = min(max(1, round(fraction * len(different))), MAX_HELD_OUT, len(different) - 1)
    order = torch.randperm(len(different), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [different[position] for position in order[:count]]
    held_out = sorted(group[0] for group in chosen)
    excluded = {index for group in chosen for index in group}
    return [index for index in indices if index not in excluded], held_out


def different_images(images: TrainingSet, indices: Sequence[int]) -> list[list[int]]:
    """Return a list for each different image, of its index and those of its copies, which have an equal latent."""
    copies: dict[bytes, list[int]] = {}
    for index in indices:
        content = images.latents[index].contiguous().cpu().view(torch.uint8).numpy().tobytes()
        copies.setdefault(hashlib.blake2b(content).digest(), []).append(index)
    return list(copies.values())


class Measurements:
    """Measures some images now and then while a training runs.

    Args:
        images: at fixed noise.
        images_per_step: how many images a step takes; with it measurements come as rarely as they cost.
        unit: the loss of predicting the mean target; losses are divided by it.
    """

    def __init__(self, images: ValidationSet, images_per_step: int, unit: float) -> None:
        self.images, self.unit = images, unit
        forward_passes = len(images.indices) * len(NOISE_FRACTIONS)
        self.interval = math.ceil(_STEPS_PER_PASS * forward_passes / images_per_step)
        self.history: list[tuple[int, float]] = []  # step and loss
        self.last_restart = 0  # step of the last restart, after which a share of the adapter is fresh noise

    def is_due(self, step: int, last_step: int) -> bool:
        """Return whether to measure after this step."""
        return step % self.interval == 0 or step == last_step

    def is_overdue(self, step: int, last_step: int) -> bool:
        """Return whether a measurement is due at this step and is missing, as one that was interrupted."""
        return self.is_due(step, last_step) and not (self.history and self.history[-1][0] == step)

    def measure(self, step: int, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Measure the adapter as it is, unless asked to stop."""
        parts = []
        stopped = False
        for part in self.images.iterate_losses():
            if stopped := should_stop():
                break
            parts.append(part)
        if not self.images.processes.any(stopped):
            self.record(step, float(self.images.collect(parts).mean()) / self.unit)

    def record(self, step: int, loss: float) -> None:
        """Take a loss into the history."""
        self.history.append((step, loss))

    def should_stop(self) -> bool:
        """Return whether the training should end."""
        return False

    @property
    def reason(self) -> str:
        """Why the training ends, as a clause."""
        return ""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it."""
        return {"history": [list(pair) for pair in self.history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self.history[:] = [(step, loss) for step, loss in state["history"]]


class EarlyStopping(Measurements):
    """Measures the loss of held-out images, keeps the weights of the best step, and says when it is passed.

    Args:
        held_out: the images to measure.
        parameters: the adapter's weights.
        images_per_step: how many images a step takes.
        unit: the loss of predicting the mean target; losses are divided by it.
    """

    def __init__(self, held_out: ValidationSet, parameters: FlatParameters, images_per_step: int, unit: float) -> None:
        super().__init__(held_out, images_per_step, unit)
        self.parameters = parameters
        self.best_step, self.best_loss = 0, math.inf
        self._best = parameters.master.clone()

    def record(self, step: int, loss: float) -> None:
        """Take a loss into the history; the untrained adapter, at step 0, is never the best."""
        super().record(step, loss)
        if step > 0 and loss < self.best_loss:
            self.best_step, self.best_loss = step, loss
            self._best.copy_(self.parameters.master)

    def should_stop(self) -> bool:
        """Return whether the best step lies so far back that a better one is not expected."""
        since = self.history[-1][0] - self.best_step if self.history else 0
        return self.best_step > 0 and since >= max(_PATIENCE * self.interval, self.best_step / 2)

    @property
    def reason(self) -> str:
        """Why the training ends, as a clause."""
        return f"step {self.best_step} was better"

    @property
    def improves(self) -> bool:
        """Whether the best step is better than the model alone, as far as that was measured."""
        measured_first = bool(self.history) and self.history[0][0] == 0
        return not measured_first or not self.best_loss >= self.history[0][1]

    def restore_best(self, step: int) -> int:
        """Go back to the weights of the best step, if a later one was measured, and return the step that they are of.

        step: the step that the weights are of now.
        """
        if not (self.best_step and self.history[-1][0] > self.best_step):
            return step
        with torch.no_grad():
            self.parameters.master.copy_(self._best)
        self.parameters.refresh()
        return self.best_step

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it."""
        best = {"best_step": self.best_step, "best_loss": self.best_loss, "best": self._best}
        return {**super().state_dict(), **best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        super().load_state_dict(state)
        self.best_step, self.best_loss = state["best_step"], state["best_loss"]
        self._best.copy_(state["best"])
