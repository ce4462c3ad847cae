"""AC-LoRA in plain PyTorch: train a LoRA whose ranks follow the signal, save it, and look at what it learned.

Nothing in here knows ComfyUI. See docs/examples/train_without_comfyui.py for a training of a network of your own.
"""

from .adapter import (
    Adapter,
    Layer,
    RankReport,
    ResizeConfig,
    build_metadata,
    load,
    resize,
    save,
    save_in_format,
    to_state_dict,
)
from .config import CheckpointConfig, TrainConfig
from .dataset import scan_folder
from .diffusion import DiffusionModel, Objective, SimpleModel, SimpleTrainingSet, TrainingSet
from .inspection import inspect_lora
from .training import Previews, Progress, Result, train

__all__ = [
    "Adapter",
    "CheckpointConfig",
    "DiffusionModel",
    "Layer",
    "Objective",
    "Previews",
    "Progress",
    "RankReport",
    "ResizeConfig",
    "Result",
    "SimpleModel",
    "SimpleTrainingSet",
    "TrainConfig",
    "TrainingSet",
    "build_metadata",
    "inspect_lora",
    "load",
    "resize",
    "save",
    "save_in_format",
    "scan_folder",
    "to_state_dict",
    "train",
]
