"""Denoising loss on pictures that training does not see, with the same noise and noise levels for every candidate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .batches import alike
from .objective import denoising_losses

if TYPE_CHECKING:
    from .training import Model

SHARES = (0.15, 0.35, 0.55, 0.75)  # of the way from clean to noise; their mean stands for the whole way


def denoising_loss(model: Model, pictures: Sequence[int], seed: int, batch_size: int = 16) -> float:
    """Mean loss over pictures of the model at four fixed noise levels each, without gradients.

    Every picture has noise of its own that follows from the seed and its number alone, so two calls on two states of an
    adapter differ by the adapter only.
    """
    total = 0.0
    with torch.no_grad():
        for batch in alike(pictures, model.groups, batch_size):
            clean = torch.cat([model.latents[number] for number in batch]).to(model.device)
            for place, share in enumerate(SHARES):
                noise = torch.cat([_noise(model, number, seed, place) for number in batch]).to(model.device)
                sigma = torch.full((len(batch),), model.objective.sigma_at(share), device=model.device)
                total += denoising_losses(model, sigma, noise, clean, batch).sum().item()
    return total / (len(pictures) * len(SHARES))


def _noise(model: Model, number: int, seed: int, place: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + number * 31 + place) % 2**63)
    return torch.randn(model.latents[number].shape, generator=generator)
