"""Masks of pictures: how much each place of a latent counts in the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .objective import Objective, output_gain

if TYPE_CHECKING:
    from .batch import Batch
    from .model import Model


def position_weights(mask: Tensor, floor: float = 0.0) -> Tensor:
    """What each place counts, of the mask's shape: floor where it is black, 1 where it is white, over their mean.

    The mean of the weights is 1, so a picture with a small mask counts as much as one without, and its loss is the
    mean over what is white.
    """
    weights = floor + (1.0 - floor) * mask.float()
    return weights / weights.mean()


def prediction_loss(
    objective: Objective,
    sigma: Tensor,
    noisy: Tensor,
    latent: Tensor,
    denoised: Tensor,
    positions: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the raw output for each picture, (n,), from the x0 that the model gave.

    positions: what each place counts, (n, 1, ..., h, w); None where all count the same.
    """
    error = (denoised.float() - latent) / output_gain(objective, sigma, noisy)
    squares = error.square() if positions is None else error.square() * positions
    return squares.flatten(1).mean(1)


def denoising_losses(model: Model, batch: Batch) -> Tensor:
    """What the model loses on each picture of a batch on its device, (n,)."""
    noisy = model.objective.add_noise(batch.sigma, batch.noise, batch.latents)
    denoised = model.denoise(noisy, batch.sigma, batch.conditioning)
    return prediction_loss(model.objective, batch.sigma, noisy, batch.latents, denoised, batch.positions)
