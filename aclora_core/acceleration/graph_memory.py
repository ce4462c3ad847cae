"""Memory of CUDA graphs that the driver keeps for the next graph."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

import torch


def release_graph_memory(device: torch.device) -> None:
    """Give memory that no graph uses any more back, so that other tensors can have it.

    With cudaMallocAsync, which ComfyUI chooses, the driver allocates the memory of graphs and keeps it when they are
    destroyed (CUDA C++ Programming Guide, "Physical Memory Footprint"). PyTorch has no function that gives it back.
    """
    if torch.cuda.get_allocator_backend() != "cudaMallocAsync":
        return
    with suppress(OSError, AttributeError):  # another driver, which keeps its memory
        driver, handle = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1"), ctypes.c_int()
        index = torch.cuda.current_device() if device.index is None else device.index
        if driver.cuDeviceGet(ctypes.byref(handle), index) == 0:
            driver.cuDeviceGraphMemTrim(handle)
