"""Trainable LoRA branches beside frozen layers: which layers, their parameters, injecting them and taking them out."""

from .injection import attached
from .parameters import AdapterWeights, make_weights
from .targets import chosen_layers, strengths

__all__ = [
    "AdapterWeights",
    "attached",
    "chosen_layers",
    "make_weights",
    "strengths",
]
