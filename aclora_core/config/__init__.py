"""All settings of a training, checked when they are set. Loads nothing that trains."""

from ..method import Measure
from .checkpoints import CheckpointConfig, Resume
from .choices import (
    Checkpointing,
    LayerPreset,
    LossWeighting,
    OptimizerName,
    RestartMode,
    Schedule,
    Threshold,
    Timesteps,
)
from .layer_patterns import rank_overrides, select_layers
from .presets import Preset, preset_settings
from .train_config import TrainConfig

__all__ = [
    "CheckpointConfig",
    "Checkpointing",
    "LayerPreset",
    "LossWeighting",
    "Measure",
    "OptimizerName",
    "Preset",
    "RestartMode",
    "Resume",
    "Schedule",
    "Threshold",
    "Timesteps",
    "TrainConfig",
    "preset_settings",
    "rank_overrides",
    "select_layers",
]
