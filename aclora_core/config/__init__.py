"""All settings of a training, checked when they are set. Loads nothing that trains."""

from .checkpoints import CheckpointConfig, Resume
from .choices import LayerPreset, LossWeighting, OptimizerName, Schedule, Timesteps
from .layer_patterns import rank_overrides, select_layers
from .train_config import TrainConfig

__all__ = [
    "CheckpointConfig",
    "LayerPreset",
    "LossWeighting",
    "OptimizerName",
    "Resume",
    "Schedule",
    "Timesteps",
    "TrainConfig",
    "rank_overrides",
    "select_layers",
]
