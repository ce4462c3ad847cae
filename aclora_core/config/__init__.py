"""Every setting of a training, checked before the work. Loads nothing but the names of the choices."""

from .checkpoints import Checkpoints, Resume
from .choices import LossWeight, Name, Preset, Schedule, Timesteps
from .layer_patterns import ranks, select
from .train_config import TrainConfig

__all__ = [
    "Checkpoints",
    "LossWeight",
    "Name",
    "Preset",
    "Resume",
    "Schedule",
    "Timesteps",
    "TrainConfig",
    "ranks",
    "select",
]
