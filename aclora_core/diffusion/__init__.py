"""What a diffusion model predicts, at which noise levels, and the loss of its prediction."""

from .batch import Batch
from .loss import denoising_losses, position_weights
from .model import Model
from .objective import Objective, Sampling, draw_sigmas, loss_weights, target_variance, with_timesteps

__all__ = [
    "Batch",
    "Model",
    "Objective",
    "Sampling",
    "denoising_losses",
    "draw_sigmas",
    "loss_weights",
    "position_weights",
    "target_variance",
    "with_timesteps",
]
