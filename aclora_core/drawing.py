"""What each step learns from: its pictures, in batches of alike ones, with fresh noise at fresh noise levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batches import Batch, Order, alike, make_batch, steps_per_epoch
from .config import TrainConfig
from .graphs import moved
from .model import Model
from .objective import draw_sigmas, loss_weights, with_timesteps


class Step(NamedTuple):
    """The batches of a step, whose pictures weigh 1 together; its epoch, from 1; whether it is the last of it."""

    batches: list[Batch]
    epoch: int
    ends_epoch: bool


class Drawing:
    """Draws step after step without end. The generator is shared: its state is no part of this one's."""

    def __init__(
        self, model: Model, config: TrainConfig, pictures: Sequence[int], generator: torch.Generator
    ) -> None:
        self.model, self.config, self._generator = model, config, generator
        self._objective = with_timesteps(model.objective, config.timesteps)
        arrangement = pictures, model.groups, config.batch_size
        self.per_epoch = steps_per_epoch(*arrangement, config.accumulate)
        self._order = Order(*arrangement, generator, config.accumulate, model.variants)

    def next_step(self) -> Step:
        """The next one. What is alike is drawn together, so its numbers are those of one batch, however it is split."""
        epoch, ends_epoch, pictures = next(self._order)
        batches = []
        for same in alike(pictures, self.model.groups, len(pictures)):
            noise, sigma = self._draw(same, self._generator)
            for start in range(0, len(same), self.config.batch_size):
                part = slice(start, start + self.config.batch_size)
                batches.append(self._batch(same[part], noise[part], sigma[part], 1 / len(pictures)))
        return Step(batches, epoch, ends_epoch)

    def trial(self, picture: int) -> Batch:
        """A batch of one picture, on the device, to try out what a step takes; text encoders are not asked to learn."""
        noise, sigma = self._draw([picture], torch.Generator().manual_seed(0))
        with torch.no_grad():
            batch: Batch = moved(self._batch([picture], noise, sigma, 1.0), self.model.device)
        return batch

    def _draw(self, pictures: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Noise and noise levels for pictures of one group."""
        latent = self.model.latents[pictures[0]]
        noise = torch.randn((len(pictures), *latent.shape[1:]), generator=generator)
        return noise, draw_sigmas(self._objective, len(pictures), generator, latent)

    def _batch(self, pictures: Sequence[int], noise: Tensor, sigma: Tensor, weight: float) -> Batch:
        of_levels = loss_weights(self._objective, sigma, self.config.loss_weight, self.config.min_snr_gamma)
        return make_batch(self.model, pictures, noise, sigma, weight, of_levels)

    def state_dict(self) -> dict[str, Any]:
        """Where it stands; the generator, which others may draw from too, is not part of it."""
        return self._order.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from where another one stood."""
        self._order.load_state_dict(state)
