"""What each step learns from: its pictures, in batches of alike ones, with fresh noise at fresh noise levels."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import TrainConfig
from ..diffusion import Batch, Model, draw_sigmas, loss_weights, position_weights, with_timesteps
from ..storage import to_device
from .sampler import EpochSampler, group_by_key, micro_batches, steps_per_epoch, style_indices


class StepBatches(NamedTuple):
    """The batches of a step, whose pictures weigh 1 together; its epoch, from 1; whether it is the last of it.

    Among regularisation pictures those of the style alone weigh, unless there are none: the loss that is told is
    theirs. What is learned is the mean over all, each times what it counts.
    """

    batches: list[Batch]
    epoch: int
    ends_epoch: bool
    tells: bool = True  # whether its loss is that of the style; where regularisation pictures are alone it is theirs


class BatchStream:
    """Draws step after step without end. The generator is shared: its state is no part of this one's."""

    def __init__(self, model: Model, config: TrainConfig, pictures: Sequence[int], generator: torch.Generator) -> None:
        self.model, self.config, self._generator = model, config, generator
        self._objective = with_timesteps(model.objective, config.timesteps)
        self.rows = config.batch_size  # pictures that go through the model at once, at most
        self.per_epoch = steps_per_epoch(len(pictures), config.batch_size, config.accumulate)
        size = config.batch_size * config.accumulate
        self._order = EpochSampler(pictures, model.batch_keys, size, generator, model.variants)

    def next_step(self) -> StepBatches:
        """The next one. What is alike is drawn together, so its numbers are those of one batch, however it is split."""
        epoch, ends_epoch, pictures = next(self._order)
        drawn: dict[int, tuple[Tensor, Tensor]] = {}
        for same in group_by_key(pictures, self.model.batch_keys, len(pictures)):
            noise, sigma = self._draw(same, self._generator)
            drawn |= zip(same, zip(noise.split(1), sigma.split(1), strict=True), strict=True)
        style = style_indices(self.model, pictures)
        batches = []
        for part in micro_batches(pictures, self.model.batch_keys, self.rows):
            noise, sigma = (torch.cat(rows) for rows in zip(*(drawn[number] for number in part), strict=True))
            batches.append(self._batch(part, noise, sigma, *self._weights(part, style or pictures, len(pictures))))
        return StepBatches(batches, epoch, ends_epoch, bool(style))

    def trial(self, picture: int) -> Batch:
        """A batch of one picture, on the device, to try out what a step takes; text encoders are not asked to learn."""
        noise, sigma = self._draw([picture], torch.Generator().manual_seed(0))
        with torch.no_grad():
            batch = self._batch([picture], noise, sigma, *self._weights([picture], [picture], 1))
            on_device: Batch = to_device(batch, self.model.device)
        return on_device

    def _draw(self, pictures: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Noise and noise levels for pictures of one group."""
        latent = self.model.latents[pictures[0]]
        noise = torch.randn((len(pictures), *latent.shape[1:]), generator=generator)
        return noise, draw_sigmas(self._objective, len(pictures), generator, latent)

    def _weights(
        self, pictures: Sequence[int], telling: Sequence[int], count: int
    ) -> tuple[float | Tensor, Tensor | None]:
        """What pictures weigh in the loss of a step of so many, and in what it learns where that differs."""
        known = self.model.regularisation
        if not known:
            return 1 / count, None
        told = torch.tensor([1 / len(telling) if number in telling else 0.0 for number in pictures])
        return told, torch.tensor([known.get(number, 1.0) / count for number in pictures])

    def _batch(
        self, pictures: Sequence[int], noise: Tensor, sigma: Tensor, weight: float | Tensor, learned: Tensor | None
    ) -> Batch:
        of_levels = loss_weights(self._objective, sigma, self.config.loss_weight, self.config.min_snr_gamma)
        return make_batch(self.model, pictures, noise, sigma, weight, of_levels, learned, self.config.mask_floor)

    def state_dict(self) -> dict[str, Any]:
        """Where it stands; the generator, which others may draw from too, is not part of it."""
        return self._order.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from where another one stood."""
        self._order.load_state_dict(state)


def joined_weights(model: Model, pictures: Sequence[int], floor: float) -> Tensor | None:
    """The weights of the places of pictures of one group, (n, 1, ..., h, w); None where no picture has a mask.

    All pictures of a training get them, or none: what is recorded in a graph always has the same inputs.
    """
    if not model.masks:
        return None
    rows = []
    for number in pictures:
        latent = model.latents[number]
        shape = (1, *(1 for _ in latent.shape[1:-2]), *latent.shape[-2:])
        rows.append(position_weights(model.masks[number], floor) if number in model.masks else torch.ones(shape))
    return torch.cat(rows)


def largest_batch(pictures: Sequence[int], model: Model, batch_size: int) -> tuple[int, int]:
    """Rows of the batch with the most numbers in it, and one of its pictures; any variants of them may meet."""
    members: dict[Hashable, list[int]] = {}  # one variant of each picture that may be in the group
    for picture in pictures:
        for group, number in {model.batch_keys[n]: n for n in model.variants.get(picture, (picture,))}.items():
            members.setdefault(group, []).append(number)
    batches = [same[:batch_size] for same in members.values()]
    largest = max(batches, key=lambda batch: len(batch) * model.latents[batch[0]].numel())
    return len(largest), largest[0]


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
    key, condition = _key(model, pictures), model.conditioning(pictures)
    return Batch(latents, noise, sigma, weights, condition, key, pictures, loss_weight, learned, positions)


def _key(model: Model, pictures: Sequence[int]) -> Hashable:
    return model.batch_keys[pictures[0]], len(pictures)


def split_rows(model: Model, batch: Batch, rows: int) -> list[Batch]:
    """The same pictures at most so many at a time, and weighing as before; the batch itself where it has no more."""
    if len(batch.pictures) <= rows:
        return [batch]
    return [_part(model, batch, slice(start, start + rows)) for start in range(0, len(batch.pictures), rows)]


def _part(model: Model, batch: Batch, rows: slice) -> Batch:
    pictures = batch.pictures[rows]
    names = ("latents", "noise", "sigma", "weight", "loss_weight", "learned", "positions")
    tensors = {name: tensor[rows] for name in names if (tensor := getattr(batch, name)) is not None}
    return replace(
        batch, pictures=pictures, key=_key(model, pictures), conditioning=model.conditioning(pictures), **tensors
    )
