"""Out of memory on a GPU, in every form in which it is reported.

PyTorch's allocator raises torch.cuda.OutOfMemoryError. Where a library or the driver itself finds no memory, for its
workspace, a kernel that is loaded when it first runs, or a graph, there is only the text of a RuntimeError.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# CUDA's own words, also of a torch.AcceleratorError, and those of MPS; then cuBLAS's and cuDNN's.
_TEXTS = ("out of memory", "_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a GPU has no memory left."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)


@contextmanager
def out_of_memory_named() -> Iterator[None]:
    """Raise torch.cuda.OutOfMemoryError wherever the block runs out of memory, and everything else as it is."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # as the cause it would keep what the block has allocated
        raise torch.cuda.OutOfMemoryError(str(error)) from error
