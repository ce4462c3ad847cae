"""Trainable LoRA branches beside frozen layers: which layers, their parameters, injecting them and taking them out."""

from .injection import injected
from .parameters import FlatParameters, make_parameters
from .targets import alpha_scales, target_layers

__all__ = [
    "FlatParameters",
    "alpha_scales",
    "injected",
    "make_parameters",
    "target_layers",
]
