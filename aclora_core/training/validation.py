"""Denoising loss on pictures that training does not see, and what follows from it: the best step, and when to stop.

Noise and noise levels are the same for every measurement, so two states of an adapter differ by the adapter only.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..acceleration import CudaGraphRunner
from ..diffusion import Batch, denoising_losses
from .batches import make_batch
from .sampler import group_by_key, style_indices

if TYPE_CHECKING:
    from ..diffusion import Model
    from ..lora import FlatParameters


SHARES = (0.15, 0.35, 0.55, 0.75)  # of the way from clean to noise; their mean stands for the whole way


FEWEST_PICTURES = 8  # with fewer, each is worth more to the training than to the validation


MOST_HELD_OUT = 12  # more would only be measured more rarely


# A forward pass alone takes some 40 % of a step on the same pictures; a measurement comes when 25 times its cost has
# been spent on steps, which leaves it 4 % of the time.
_STEPS_PER_PASS = 0.4 * 25


_PATIENCE = 3  # measurements


class ValidationSet:
    """Pictures at four fixed noise levels each. Every picture's noise follows from the seed and its number alone."""

    def __init__(
        self,
        model: Model,
        pictures: Sequence[int],
        seed: int,
        batch_size: int = 16,
        graphs: CudaGraphRunner | None = None,
        mask_floor: float = 0.0,
    ) -> None:
        self.model, self.pictures, self._mask_floor = model, list(pictures), mask_floor
        self._graphs = graphs or CudaGraphRunner(model.device, enabled=False)
        together = group_by_key(pictures, model.batch_keys, batch_size)
        self._batches = [
            (numbers, self._rows(numbers, place, seed)) for place in range(len(SHARES)) for numbers in together
        ]

    def _rows(self, pictures: Sequence[int], place: int, seed: int) -> Batch:
        noise = torch.cat([_noise(self.model, number, seed, place) for number in pictures])
        sigma = torch.full((len(pictures),), self.model.objective.sigma_at(SHARES[place]))
        with torch.no_grad():  # else what text encoders that learn have computed would be kept as long as this
            return make_batch(self.model, pictures, noise, sigma, 1.0, mask_floor=self._mask_floor)

    def losses(self) -> Tensor:
        """The loss of each picture at each level, float64 on the CPU, always in the same order."""
        return torch.cat(list(self.parts()))

    def parts(self) -> Iterator[Tensor]:
        """The same, batch by batch."""
        for pictures, batch in self._batches:
            if self.model.text_encoders:  # which may have learned since
                with torch.no_grad():
                    batch = replace(batch, conditioning=self.model.conditioning(pictures))
            yield self._graphs.call(self._measure, batch, batch.key).double().cpu()

    def _measure(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            return denoising_losses(self.model, batch)


def denoising_loss(model: Model, pictures: Sequence[int], seed: int, batch_size: int = 16) -> float:
    """Mean loss of the model as it is over pictures at fixed noise, without gradients."""
    return float(ValidationSet(model, pictures, seed, batch_size).losses().mean())


def hold_out(model: Model, pictures: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """(for training, held out), drawn by the seed. A picture that comes several times is never on both sides.

    Nothing is held out of fewer than eight different pictures, or when the share is 0. Regularisation pictures are no
    part of the style: they are neither counted nor held out.
    """
    copies: dict[bytes, list[int]] = {}
    for number in style_indices(model, pictures):
        content = model.latents[number].contiguous().cpu().view(torch.uint8).numpy().tobytes()
        copies.setdefault(hashlib.blake2b(content).digest(), []).append(number)
    if share == 0 or len(copies) < FEWEST_PICTURES:
        return list(pictures), []
    count = min(max(1, round(share * len(copies))), MOST_HELD_OUT, len(copies) - 1)
    order = torch.randperm(len(copies), generator=torch.Generator().manual_seed(seed)).tolist()
    different = list(copies.values())
    held = {number for place in order[:count] for number in different[place][:1]}
    aside = {number for place in order[:count] for number in different[place]}
    return [number for number in pictures if number not in aside], sorted(held)


class EarlyStopping:
    """Watches a training: measures now and then, and keeps the weights of the best step.

    batch_size: pictures in a step. unit: what losses are divided by.
    """

    def __init__(self, held_out: ValidationSet, weights: FlatParameters, batch_size: int, unit: float) -> None:
        self.held_out, self.weights, self.unit = held_out, weights, unit
        self.interval = math.ceil(_STEPS_PER_PASS * len(held_out.pictures) * len(SHARES) / batch_size)
        self.history: list[tuple[int, float]] = []
        self.best_step, self.best_loss = 0, math.inf
        self._best = weights.master.clone()

    def due(self, step: int, last_step: int) -> bool:
        """Whether to measure after this step."""
        return step % self.interval == 0 or step == last_step

    def owes(self, step: int, last_step: int) -> bool:
        """Whether a measurement is due at this step and was not made, as one that was stopped."""
        return self.due(step, last_step) and not (self.history and self.history[-1][0] == step)

    def measure(self, step: int, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Measures the adapter as it is, unless it is stopped; the untrained one, at step 0, is never the best."""
        parts = []
        for part in self.held_out.parts():
            if should_stop():
                return
            parts.append(part)
        loss = float(torch.cat(parts).mean()) / self.unit
        self.history.append((step, loss))
        if step > 0 and loss < self.best_loss:
            self.best_step, self.best_loss = step, loss
            self._best.copy_(self.weights.master)

    def passed(self) -> bool:
        """Whether the best step lies so far back that it will not come again."""
        since = self.history[-1][0] - self.best_step if self.history else 0
        return self.best_step > 0 and since >= max(_PATIENCE * self.interval, self.best_step / 2)

    def restore_best(self, step: int) -> int:
        """Goes back to the best step, if a later one was measured; else the adapter stays as it is.

        step: that the adapter is of. Gives the one that it is of then.
        """
        if not (self.best_step and self.history[-1][0] > self.best_step):
            return step
        with torch.no_grad():
            self.weights.master.copy_(self._best)
        self.weights.refresh()
        return self.best_step

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        best = {"best_step": self.best_step, "best_loss": self.best_loss, "best": self._best}
        return {"history": [list(pair) for pair in self.history], **best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from where another one stood."""
        self.history[:] = [(step, loss) for step, loss in state["history"]]
        self.best_step, self.best_loss = state["best_step"], state["best_loss"]
        self._best.copy_(state["best"])


def _noise(model: Model, number: int, seed: int, place: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + number * 31 + place) % 2**63)
    return torch.randn(model.latents[number].shape, generator=generator)
