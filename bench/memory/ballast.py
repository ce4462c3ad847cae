"""GPU memory that is occupied, so that a training finds little free."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bench.step_time.models import GIB

# In a process of its own, since ComfyUI counts what its own process has allocated as memory that it can reuse.
_HOLD = """
import sys, torch
free, _ = torch.cuda.mem_get_info()
held = torch.empty(max(1, int(free - float(sys.argv[1]))), dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def left_free(gib: float | None) -> Iterator[None]:
    """Occupy all GPU memory but so many GiB; nothing if that is None.

    What PyTorch still holds in this process counts as free, as a training can use it.
    """
    if gib is None:
        yield
        return
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved() if torch.cuda.is_initialized() else 0
    arguments = [sys.executable, "-c", _HOLD, str(gib * GIB - held)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        if process.stdout.readline() != "held\n":
            raise RuntimeError("The process that occupies GPU memory has failed; its message stands above.")
        try:
            yield
        finally:
            process.stdin.close()
    torch.cuda.empty_cache()
