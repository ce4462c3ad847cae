"""Fused Triton kernels for operations that PyTorch runs in several memory passes.

Each operation has a file of its own with four functions: the operation itself, named as the file; `supports`, its
limits; `reference`, the same in plain PyTorch; and `examples`, small inputs for the self-test. To add a kernel, write
such a file and give it a row in Kernels below. The self-test and the tests' stand-ins then find it by name.

The Triton code stands in the same file as the rest. Those files are imported when kernels are looked for, so importing
this package does not load Triton. Where Triton is missing the files still import (see _triton.py), and their limits,
references and examples can be used.

Triton comes with PyTorch's CUDA builds for Linux. It compiles at the first call and needs a C compiler and Python's
headers for that, so only a trial shows whether kernels can be used.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from . import self_test
from .kernel import DTYPES, MAX_KEYS, MAX_LAYERS, ConvParams, Kernel, KernelGroup

__all__ = [
    "ConvParams",
    "DTYPES",
    "Kernel",
    "KernelGroup",
    "MAX_KEYS",
    "MAX_LAYERS",
    "self_test",
]

log = logging.getLogger("aclora")

_MAX_ERROR = 0.02  # of the self-test, relative to the largest value; bfloat16 has 8 bits


class Kernels:
    """All fused operations, for one type of device.

    Creating it imports Triton, if that is installed.
    """

    def __init__(self, device: str) -> None:
        from . import (
            adamw,
            geglu,
            gelu,
            group_norm,
            layer_norm,
            lora_conv,
            lora_conv_gradients,
            lora_linear,
            lora_linear_backward,
            lora_linear_gradients,
            residual_norm,
            rms_norm,
            rope,
            short_key_attention,
        )

        self.device = device
        self.lora_linear = Kernel(
            device, "lora", lora_linear.lora_linear, lora_linear.supports, lora_linear.reference, lora_linear.examples
        )
        self.lora_linear_backward = Kernel(
            device,
            "lora",
            lora_linear_backward.lora_linear_backward,
            lora_linear_backward.supports,
            lora_linear_backward.reference,
            lora_linear_backward.examples,
        )
        self.lora_linear_gradients = Kernel(
            device,
            "lora",
            lora_linear_gradients.lora_linear_gradients,
            lora_linear_gradients.supports,
            lora_linear_gradients.reference,
            lora_linear_gradients.examples,
        )
        self.adamw = Kernel(device, "lora", adamw.adamw, adamw.supports, adamw.reference, adamw.examples)
        self.geglu = Kernel(device, "unet", geglu.geglu, geglu.supports, geglu.reference, geglu.examples)
        self.group_norm = Kernel(
            device, "unet", group_norm.group_norm, group_norm.supports, group_norm.reference, group_norm.examples
        )
        self.layer_norm = Kernel(
            device, "unet", layer_norm.layer_norm, layer_norm.supports, layer_norm.reference, layer_norm.examples
        )
        self.residual_norm = Kernel(
            device,
            "unet",
            residual_norm.residual_norm,
            residual_norm.supports,
            residual_norm.reference,
            residual_norm.examples,
        )
        self.short_key_attention = Kernel(
            device,
            "unet",
            short_key_attention.short_key_attention,
            short_key_attention.supports,
            short_key_attention.reference,
            short_key_attention.examples,
        )
        self.lora_conv = Kernel(
            device, "unet", lora_conv.lora_conv, lora_conv.supports, lora_conv.reference, lora_conv.examples
        )
        self.lora_conv_gradients = Kernel(
            device,
            "unet",
            lora_conv_gradients.lora_conv_gradients,
            lora_conv_gradients.supports,
            lora_conv_gradients.reference,
            lora_conv_gradients.examples,
        )
        self.rms_norm = Kernel(
            device, "transformer", rms_norm.rms_norm, rms_norm.supports, rms_norm.reference, rms_norm.examples
        )
        self.rope = Kernel(device, "transformer", rope.rope, rope.supports, rope.reference, rope.examples)
        self.gelu = Kernel(device, "transformer", gelu.gelu, gelu.supports, gelu.reference, gelu.examples)

    def by_name(self) -> dict[str, Kernel[..., ..., Any]]:
        """Return the kernels by the names of their operations."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Kernel)}

    def of_group(self, group: KernelGroup) -> list[Kernel[..., ..., Any]]:
        """Return the kernels that are compiled and tested together."""
        return [kernel for kernel in self.by_name().values() if kernel.group == group]


@functools.lru_cache
def find_kernels(device: torch.device, dtype: torch.dtype, group: KernelGroup) -> Kernels | None:
    """Compile and test a group of kernels, and return all kernels if the group works.

    The first call for a device takes seconds if Triton has not compiled the kernels before. If the group cannot be
    used, the first call logs why.

    Args:
        device: where the kernels are to run.
        dtype: of the activations.
        group: the kernels that are needed; those of the other groups are not compiled.

    Returns:
        The kernels; None where the device is no CUDA device, the dtype is not supported, Triton is missing or cannot
        compile, or a kernel of the group fails its self-test.
    """
    if device.type != "cuda" or dtype not in DTYPES:
        return None
    try:
        return _tested_kernels(device, dtype, group)
    except Exception as problem:  # a compiler, a driver or a library: whatever is wrong, training goes on without
        reason = (str(problem) or type(problem).__name__).split("\n")[0]
        log.info("AC-LoRA: steps are somewhat slower: the fused %s kernels cannot be used (%s).", group, reason)
        return None


def _tested_kernels(device: torch.device, dtype: torch.dtype, group: KernelGroup) -> Kernels:
    from ._triton import require_triton

    require_triton()
    kernels = Kernels(device.type)
    with compile_in_parallel(device, kernels):
        self_test.max_relative_error(kernels.of_group(group), device, dtype)
    error = self_test.max_relative_error(kernels.of_group(group), device, dtype)
    if not error < _MAX_ERROR:  # also true for NaN
        raise ValueError(f"their results are wrong by {error:.2g} on this device")
    return kernels


@contextmanager
def compile_in_parallel(device: torch.device, kernels: Kernels | None) -> Iterator[None]:
    """Record the kernels launched in this block without running them, then compile them in parallel on exit.

    What the block computes is of no use.

    Args:
        device: where the kernels are to run.
        kernels: the kernels found for the device; None changes nothing.
    """
    if kernels is None:
        yield
        return
    from . import launch

    with launch.compiling_together(device):
        yield
