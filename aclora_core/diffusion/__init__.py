"""What a diffusion model predicts, at which noise levels, on which images, and the loss of its prediction."""

from .batch import Batch
from .loss import denoising_losses, position_weights, prediction_loss, weighted_loss
from .model import DiffusionModel, SimpleModel
from .objective import (
    Objective,
    Sampling,
    draw_sigmas,
    loss_weights,
    sigmas_at_quantiles,
    stratified_quantiles,
    target_variance,
    with_timesteps,
)
from .sampling import draw_latents
from .training_set import SimpleTrainingSet, TrainingSet

__all__ = [
    "Batch",
    "DiffusionModel",
    "Objective",
    "Sampling",
    "SimpleModel",
    "SimpleTrainingSet",
    "TrainingSet",
    "denoising_losses",
    "draw_latents",
    "draw_sigmas",
    "loss_weights",
    "position_weights",
    "prediction_loss",
    "sigmas_at_quantiles",
    "stratified_quantiles",
    "target_variance",
    "weighted_loss",
    "with_timesteps",
]
