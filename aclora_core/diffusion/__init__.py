"""What a diffusion model predicts, at which noise levels, on which images, and the loss of its prediction."""

from .batch import Batch
from .loss import batch_loss, denoising_losses, position_weights
from .model import DiffusionModel, SimpleModel
from .objective import Objective, Sampling, draw_sigmas, loss_weights, target_variance, with_timesteps
from .training_set import SimpleTrainingSet, TrainingSet

__all__ = [
    "Batch",
    "DiffusionModel",
    "Objective",
    "Sampling",
    "SimpleModel",
    "SimpleTrainingSet",
    "TrainingSet",
    "batch_loss",
    "denoising_losses",
    "draw_sigmas",
    "loss_weights",
    "position_weights",
    "target_variance",
    "with_timesteps",
]
