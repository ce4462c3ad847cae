"""Trainable LoRA branches beside frozen layers: target layers, parameters, injection into a model."""

from .injection import injected
from .parameters import FlatParameters, LoraSpec, make_parameters
from .targets import alpha_scales, target_layers

__all__ = [
    "FlatParameters",
    "LoraSpec",
    "alpha_scales",
    "injected",
    "make_parameters",
    "target_layers",
]
