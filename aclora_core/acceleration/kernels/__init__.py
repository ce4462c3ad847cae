"""Fused Triton kernels for operations that PyTorch runs in several memory passes.

Each operation has a file of its own, with the operation, named as the file; `supports`, its limits; `reference`, the
same in plain PyTorch; `examples`, small inputs for the self-test; and `KERNEL`, which holds them together with the
group that the kernel is compiled and tested with. To add a kernel, write such a file and give it a row in Kernels
below. The self-test and the tests' stand-ins then find it by name.

The Triton code stands in the same file. Kernels imports these files when kernels are looked for, so importing this
package does not load Triton. Where Triton is missing the files still import (see _triton.py), and their limits,
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
from torch import Tensor

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
            from_float8,
            geglu,
            gelu,
            group_norm,
            layer_norm,
            lora_conv,
            lora_conv_gradients,
            lora_linear,
            lora_linear_backward,
            lora_linear_gradients,
            modulate,
            residual_norm,
            rms_norm,
            rope,
            short_key_attention,
        )

        self.device = device
        self.lora_linear = lora_linear.KERNEL.on(device)
        self.lora_linear_backward = lora_linear_backward.KERNEL.on(device)
        self.lora_linear_gradients = lora_linear_gradients.KERNEL.on(device)
        self.from_float8 = from_float8.KERNEL.on(device)
        self.adamw = adamw.KERNEL.on(device)
        self.geglu = geglu.KERNEL.on(device)
        self.group_norm = group_norm.KERNEL.on(device)
        self.layer_norm = layer_norm.KERNEL.on(device)
        self.residual_norm = residual_norm.KERNEL.on(device)
        self.short_key_attention = short_key_attention.KERNEL.on(device)
        self.lora_conv = lora_conv.KERNEL.on(device)
        self.lora_conv_gradients = lora_conv_gradients.KERNEL.on(device)
        self.rms_norm = rms_norm.KERNEL.on(device)
        self.rope = rope.KERNEL.on(device)
        self.gelu = gelu.KERNEL.on(device)
        self.modulate = modulate.KERNEL.on(device)

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
        # Hooks of its own, for a test within a block that is being recomputed: the block's would count its tensors.
        with torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged):
            return _tested_kernels(device, dtype, group)
    except Exception as problem:  # a compiler, a driver or a library: whatever is wrong, training goes on without
        reason = (str(problem) or type(problem).__name__).split("\n")[0]
        log.info(
            "AC-LoRA: steps are slower, up to twice as long: the fused %s kernels cannot be used (%s).", group, reason
        )
        return None


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


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
