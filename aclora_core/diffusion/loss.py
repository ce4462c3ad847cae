"""The denoising loss of a micro-batch, and the weights of masks in it."""

from __future__ import annotations

from torch import Tensor

from .batch import Batch
from .model import DiffusionModel
from .objective import Objective, c_out


def position_weights(mask: Tensor, floor: float = 0.0) -> Tensor:
    """Turn a mask into loss weights per position: `floor` where it is black, 1 where it is white, with mean 1.

    The mean is 1, so an image with a small mask counts as much as one without, and its loss is the mean over the white
    part.
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
    """Return the mean squared error of the raw output for each image, (n,).

    x0 is linear in the raw output, so the error of x0 over c_out is the error of the raw output.

    Args:
        objective: what the model predicts.
        sigma: (n,), noise levels.
        noisy: (n, channels, ...), what the model saw.
        latent: (n, channels, ...), the clean latents.
        denoised: (n, channels, ...), the x0 that the model predicted.
        positions: (n, 1, ..., h, w), weights from masks; None where all positions count the same.
    """
    error = (denoised.float() - latent) / c_out(objective, sigma, noisy)
    squares = error.square() if positions is None else error.square() * positions
    return squares.flatten(1).mean(1)


def denoising_losses(model: DiffusionModel, batch: Batch) -> Tensor:
    """Return the denoising loss of each image of a batch on the model's device, (n,)."""
    noisy = model.objective.add_noise(batch.sigma, batch.noise, batch.latents)
    denoised = model.denoise(noisy, batch.sigma, batch.conditioning)
    return prediction_loss(model.objective, batch.sigma, noisy, batch.latents, denoised, batch.position_weights)


def weighted_loss(losses: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return (training loss, reported loss) of a batch, both scalars, from the loss of each image, (n,).

    The losses of a step's batches add up to those of the step. AC-LoRA Eq. 5 takes the reported loss.
    """
    weighted = losses * batch.weight
    reported = weighted.sum()
    if batch.train_weight is None and batch.noise_level_weight is None:
        return reported, reported
    train = weighted if batch.train_weight is None else losses * batch.train_weight
    if batch.noise_level_weight is not None:
        train = train * batch.noise_level_weight
    return train.sum(), reported
