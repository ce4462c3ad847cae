"""Let the CPU wait for the GPU, where the allocator takes more memory if it runs ahead.

cudaMallocAsync, which ComfyUI chooses, joins pieces of freed memory only once the GPU has passed the point where they
were freed. A CPU that runs ahead of the GPU finds none and takes new memory: an eager step of Flux.1 in fp8 takes 4.2
instead of 2.5 GB, one of Qwen-Image 5.3 instead of 2.3 (bench/README.md). Captured graphs do not need this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_waits = False  # one for all threads, as backward passes run in another


@contextmanager
def paced(wanted: bool = True) -> Iterator[None]:
    """Let keep_pace wait while the context lasts, where that saves memory. It must not last during a capture."""
    global _waits
    before = _waits
    _waits = wanted and torch.cuda.is_available() and torch.cuda.get_allocator_backend() == "cudaMallocAsync"
    try:
        yield
    finally:
        _waits = before


def keep_pace() -> None:
    """Wait for the GPU within `paced`; called several times in a block, in both passes."""
    if _waits:
        torch.cuda.synchronize()
