"""The stream of training batches: images in micro-batches, with fresh noise at fresh noise levels."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..acceleration import out_of_memory_named
from ..config import TrainConfig
from ..diffusion import (
    Batch,
    DiffusionModel,
    TrainingSet,
    draw_sigmas,
    loss_weights,
    position_weights,
    sigmas_at_quantiles,
    stratified_quantiles,
    with_timesteps,
)
from ..distributed import ALONE, Processes
from ..storage import map_tensors, to_device
from .sampler import EpochSampler, group_by_key, micro_batches, steps_per_epoch, style_indices


@dataclass(frozen=True)
class StepBatches:
    """The micro-batches of one step, or of this process's share of it.

    With prior preservation each is followed by that of its empty captions. The reported loss averages over the style's
    images only, or over all where a step has none of them. The training loss averages over all images, each times its
    regularisation weight.
    """

    batches: list[Batch]
    epoch: int  # from 1
    ends_epoch: bool
    indices: Sequence[int] = ()  # of all images of the step, those of other processes too
    reports_style: bool = True  # whether the reported loss is that of the style


class BatchStream:
    """An endless stream of steps.

    It owns the generator that images, noise and noise levels are drawn from, and everything else that the next step
    depends on, so that its state is the position of a checkpoint. Hence its many attributes.
    """

    def __init__(
        self,
        model: DiffusionModel,
        images: TrainingSet,
        config: TrainConfig,
        indices: Sequence[int],
        generator: torch.Generator,
        processes: Processes = ALONE,
    ) -> None:
        self.model, self.images, self.config = model, images, config
        self.indices = indices
        self.generator = generator
        self.rows = config.batch_size // processes.size  # images per micro-batch, at most
        self._processes = processes
        self._objective = with_timesteps(model.objective, config.timesteps, config.timestep_shift)
        size = config.batch_size * config.accumulate
        self._sampler = EpochSampler(indices, images.batch_keys, size, generator, images.variants)
        self._upcoming: StepBatches | None = None  # prefetched while the GPU was busy
        self._position_before_upcoming: dict[str, Any] = {}  # a checkpoint continues from here

    @property
    def steps_per_epoch(self) -> int:
        """Steps it takes to see all images once."""
        return steps_per_epoch(len(self.indices), self.config.batch_size, self.config.accumulate)

    def next_step(self) -> StepBatches:
        """Return the next step, prefetched or not.

        Raises:
            torch.cuda.OutOfMemoryError: its captions do not fit, of a text encoder that learns; the next call returns
                the same step.
        """
        if self._upcoming is not None:
            step, self._upcoming = self._upcoming, None
            return step
        position = self._position()
        try:
            with out_of_memory_named():
                return self._draw_step()
        except torch.cuda.OutOfMemoryError:
            self.load_state_dict(position)
            raise

    def prefetch(self) -> Sequence[Batch]:
        """Draw the next step while the GPU works on this one, and return its batches.

        They lie in pinned memory, from which a GPU copies without waiting. Nothing is prefetched where text encoders
        learn: their conditionings depend on the step that is still running.
        """
        if self._upcoming is not None or self.model.text_encoders:
            return ()
        self._position_before_upcoming = self._position()
        self._upcoming = self._draw_step()
        if self.model.device.type == "cuda":
            self._upcoming = replace(self._upcoming, batches=map_tensors(self._upcoming.batches, _pinned))
        return self._upcoming.batches

    def trial(self, index: int) -> Batch:
        """Return a batch of one image on the device, to try what a step needs; it carries no gradient history."""
        noise, sigma = self._draw_noise([index], torch.Generator().manual_seed(0))
        with torch.no_grad():
            batch = self._batch([index], noise, sigma, *self._image_weights([index], [index], 1))
            on_device: Batch = to_device(batch, self.model.device)
        return on_device

    def _draw_step(self) -> StepBatches:
        """Draw a step. The noise of a batch key is drawn at once, so it does not depend on how a step is split.

        Every process draws all of it, in the same way, and takes its share of the images, those of one key together.
        """
        epoch, ends_epoch, indices = next(self._sampler)
        if self.config.caption_dropout:
            indices = self._drop_captions(indices)
        quantiles: dict[int, Tensor] = {}  # by image: the strata are those of the whole step, whatever its batch keys
        if self.config.stratified_timesteps:
            quantiles = dict(zip(indices, stratified_quantiles(len(indices), self.generator), strict=True))
        drawn: dict[int, tuple[Tensor, Tensor]] = {}
        for group in group_by_key(indices, self.images.batch_keys, len(indices)):
            noise, sigma = self._draw_noise(group, self.generator, quantiles)
            drawn |= zip(group, zip(noise.split(1), sigma.split(1), strict=True), strict=True)
        style = style_indices(self.images, indices)
        batches = []
        by_key = [index for group in group_by_key(indices, self.images.batch_keys, len(indices)) for index in group]
        for part in micro_batches(indices, self.images.batch_keys, self.rows, self._processes.share(by_key)):
            noise, sigma = (torch.cat(rows) for rows in zip(*(drawn[index] for index in part), strict=True))
            weights = self._image_weights(part, style or indices, len(indices))
            batches.append(self._batch(part, noise, sigma, *weights))
            if self.config.prior_weight:
                batches.append(self._prior_batch(batches[-1]))
        return StepBatches(batches, epoch, ends_epoch, indices, bool(style))

    def _drop_captions(self, indices: Sequence[int]) -> list[int]:
        """Return the indices with those of some images replaced by the same image with the empty caption."""
        drawn = torch.rand(len(indices), generator=self.generator).tolist()
        dropped = [draw < self.config.caption_dropout for draw in drawn]
        return [self.images.without_caption[i] if drop else i for i, drop in zip(indices, dropped, strict=True)]

    def _draw_noise(
        self, indices: Sequence[int], generator: torch.Generator, quantiles: Mapping[int, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return noise (n, channels, ...) and noise levels (n,) for images with one batch key.

        quantiles: of each image's noise level, where they are drawn already.
        """
        latent = self.images.latents[indices[0]]
        noise = torch.randn((len(indices), *latent.shape[1:]), generator=generator)
        if quantiles:
            chosen = torch.stack([quantiles[index] for index in indices])
            return noise, sigmas_at_quantiles(self._objective, chosen, latent)
        return noise, draw_sigmas(self._objective, len(indices), generator, latent)

    def _image_weights(
        self, indices: Sequence[int], reporting: Sequence[int], count: int
    ) -> tuple[float | Tensor, Tensor | None]:
        """Return the weights of images in the reported loss of a step of `count`, and in its training loss."""
        known = self.images.regularisation
        if not known:
            return 1 / count, None
        reported = torch.tensor([1 / len(reporting) if index in reporting else 0.0 for index in indices])
        return reported, torch.tensor([known.get(index, 1.0) / count for index in indices])

    def _batch(
        self,
        indices: Sequence[int],
        noise: Tensor,
        sigma: Tensor,
        weight: float | Tensor,
        train_weight: Tensor | None,
    ) -> Batch:
        batch = make_batch(self.images, indices, noise, sigma, weight, self.config.mask_floor)
        by_level = loss_weights(self._objective, sigma, self.config.loss_weight, self.config.min_snr_gamma)
        return replace(batch, noise_level_weight=by_level, train_weight=train_weight)

    def _prior_batch(self, batch: Batch) -> Batch:
        """Return the same noisy latents with the empty caption, to be held to the frozen model's own prediction.

        A micro-batch of its own takes no more memory than the others. Its loss is learned from, but not reported.
        """
        train_weight = batch.weight if batch.train_weight is None else batch.train_weight
        indices = [self.images.without_caption.get(index, index) for index in batch.indices]
        with torch.no_grad():  # text encoders that learn are not held by it
            conditioning = self.images.conditioning(indices)
        return replace(
            batch,
            indices=indices,
            conditioning=conditioning,
            key=batch_key(self.images, indices, prior=True),
            weight=torch.zeros_like(batch.weight),
            train_weight=self.config.prior_weight * train_weight,
            position_weights=None,
            prior=True,
        )

    def _position(self) -> dict[str, Any]:
        return {"order": self._sampler.state_dict(), "generator": self.generator.get_state()}

    def state_dict(self) -> dict[str, Any]:
        """Return the position before the next step, prefetched or not, and the generator's state there."""
        return self._position_before_upcoming if self._upcoming else self._position()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved position."""
        self._upcoming = None
        self._sampler.load_state_dict(state["order"])
        self.generator.set_state(state["generator"])


def _pinned(tensor: Tensor) -> Tensor:
    """Return a tensor in pinned memory; as it is where no more can be pinned, as copies only take longer then."""
    try:
        return tensor if tensor.is_cuda else tensor.pin_memory()
    except RuntimeError:
        return tensor


def make_batch(
    images: TrainingSet,
    indices: Sequence[int],
    noise: Tensor,
    sigma: Tensor,
    weight: float | Tensor = 1.0,
    mask_floor: float = 0.0,
) -> Batch:
    """Return a batch of images with one batch key.

    Args:
        images: the training set.
        indices: of the images, n of them.
        noise: (n, channels, ...).
        sigma: (n,), noise levels.
        weight: in the reported loss: one for all images, or (n,).
        mask_floor: weight of positions where a mask is black.
    """
    latents = torch.cat([images.latents[index] for index in indices])
    weights = weight if isinstance(weight, Tensor) else torch.full((len(indices),), weight)
    conditioning = images.conditioning(indices)
    positions = stack_position_weights(images, indices, mask_floor)
    key = batch_key(images, indices)
    return Batch(latents, noise, sigma, weights, conditioning, key, indices, position_weights=positions)


def batch_key(images: TrainingSet, indices: Sequence[int], prior: bool = False) -> Hashable:
    """Return what a batch of these images shares with others that one captured CUDA graph serves."""
    key = images.batch_keys[indices[0]], len(indices)
    return (*key, "prior") if prior else key


def stack_position_weights(images: TrainingSet, indices: Sequence[int], floor: float) -> Tensor | None:
    """Return the position weights of images with one batch key, (n, 1, ..., h, w); None where no image has a mask.

    All images of a training get them, or none, so that a captured graph always has the same inputs.
    """
    if not images.masks:
        return None
    rows = []
    for index in indices:
        latent = images.latents[index]
        shape = (1, *(1 for _ in latent.shape[1:-2]), *latent.shape[-2:])
        masked = index in images.masks
        rows.append(position_weights(images.masks[index], floor) if masked else torch.ones(shape))
    return torch.cat(rows)


def largest_batch(indices: Sequence[int], images: TrainingSet, batch_size: int) -> tuple[int, int]:
    """Return the rows of the micro-batch with the most elements that can occur, and the index of one of its images."""
    members: dict[Hashable, list[int]] = {}  # one variant of each image that may be in the group
    for index in indices:
        one_of_each_key = {images.batch_keys[n]: n for n in images.variants.get(index, (index,))}
        for key, variant in one_of_each_key.items():
            members.setdefault(key, []).append(variant)
    batches = [group[:batch_size] for group in members.values()]
    largest = max(batches, key=lambda batch: len(batch) * images.latents[batch[0]].numel())
    return len(largest), largest[0]


def split_rows(images: TrainingSet, batch: Batch, rows: int) -> list[Batch]:
    """Split a batch into parts of at most `rows` images with their weights unchanged."""
    if len(batch.indices) <= rows:
        return [batch]
    return [_rows(images, batch, slice(start, start + rows)) for start in range(0, len(batch.indices), rows)]


def _rows(images: TrainingSet, batch: Batch, rows: slice) -> Batch:
    indices = batch.indices[rows]
    names = ("latents", "noise", "sigma", "weight", "noise_level_weight", "train_weight", "position_weights")
    tensors = {name: tensor[rows] for name in names if (tensor := getattr(batch, name)) is not None}
    with torch.no_grad() if batch.prior else nullcontext():
        conditioning = images.conditioning(indices)
    key = batch_key(images, indices, batch.prior)
    return replace(batch, indices=indices, key=key, conditioning=conditioning, **tensors)
