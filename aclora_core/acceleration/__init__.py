"""Speed and memory: CUDA graphs, fused kernels, activation checkpointing. Nothing in here changes a result."""

from .activation_checkpointing import BlockMemory
from .cuda_graphs import Graphs
from .fused_modules import FastClasses, fast_modules
from .inplace import OutOfPlace, Overwritten
from .kernels import MOST_KEYS, MOST_LAYERS, AdamW, Kernels, Steps, compiling_together, find_kernels
from .layers import CONVOLUTIONS, is_linear, is_plain_convolution

__all__ = [
    "AdamW",
    "BlockMemory",
    "CONVOLUTIONS",
    "FastClasses",
    "Graphs",
    "Kernels",
    "MOST_KEYS",
    "MOST_LAYERS",
    "OutOfPlace",
    "Overwritten",
    "Steps",
    "compiling_together",
    "fast_modules",
    "find_kernels",
    "is_linear",
    "is_plain_convolution",
]
