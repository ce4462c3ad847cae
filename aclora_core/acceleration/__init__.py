"""Speed and memory: CUDA graphs, fused kernels, activation checkpointing. Nothing in here changes a result."""

from .activation_checkpointing import ActivationCheckpointing
from .cuda_graphs import CudaGraphRunner
from .fused_modules import FusableModules, fuse_modules
from .inplace import InplaceAddLog, NoInplaceAdd
from .kernels import MAX_KEYS, MAX_LAYERS, ConvParams, Kernel, Kernels, compile_in_parallel, find_kernels
from .layers import CONVOLUTIONS, is_linear, is_plain_convolution
from .out_of_memory import out_of_memory_named
from .pace import keep_pace, paced
from .selective_checkpointing import is_kept
from .step_plan import NO_COPIES, ActivationSizes, Copies, StepPlan, best_plan, given_plan, room
from .weight_streaming import Region, WeightStream, gather_weights

__all__ = [
    "ActivationCheckpointing",
    "ActivationSizes",
    "CONVOLUTIONS",
    "ConvParams",
    "Copies",
    "CudaGraphRunner",
    "FusableModules",
    "InplaceAddLog",
    "Kernel",
    "Kernels",
    "MAX_KEYS",
    "MAX_LAYERS",
    "NO_COPIES",
    "NoInplaceAdd",
    "Region",
    "StepPlan",
    "WeightStream",
    "best_plan",
    "compile_in_parallel",
    "find_kernels",
    "fuse_modules",
    "gather_weights",
    "given_plan",
    "is_kept",
    "is_linear",
    "is_plain_convolution",
    "keep_pace",
    "out_of_memory_named",
    "paced",
    "room",
]
