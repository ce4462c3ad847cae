"""Starts kernels by the addresses of their tensors. Importing this file needs Triton.

Given tensors, Triton asks the driver for each whether the GPU can reach it. With the allocator that ComfyUI chooses
(cudaMallocAsync), memory of a graph that is being recorded has an address but is not there yet, and the driver says no.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.runtime.jit import JITFunction  # type: ignore[import-untyped,import-not-found,unused-ignore]


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """kernel[grid](*arguments, **options), for all arguments in their order."""
    if not isinstance(kernel, JITFunction):  # the interpreter's
        kernel[grid](*arguments, **options)
        return
    compiled = kernel.run(*arguments, grid=grid, warmup=True, **options)
    addresses = (it.data_ptr() if isinstance(it, Tensor) else it for it in arguments)
    compiled[(*grid, 1, 1)[:3]](*addresses)
