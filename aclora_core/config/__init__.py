"""All settings of a training, checked when they are set. Loads nothing that trains."""

from .checkpoints import CheckpointConfig, Resume
from .choices import LayerPreset, LossWeighting, OptimizerName, Schedule, Timesteps
from .layer_patterns import rank_overrides, select_layers
from .presets import Preset, preset_settings
from .train_config import TrainConfig

__all__ = [
    "CheckpointConfig",
    "LayerPreset",
    "LossWeighting",
    "OptimizerName",
    "Preset",
    "Resume",
    "Schedule",
    "Timesteps",
    "TrainConfig",
    "preset_settings",
    "rank_overrides",
    "select_layers",
]
