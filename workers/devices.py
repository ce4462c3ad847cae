"""Which GPU a process of this machine uses."""

from __future__ import annotations

import os


class NoGpuError(RuntimeError):
    """There are fewer GPUs than processes."""


def take_own_gpu() -> None:
    """Leave this process, which torchrun has started, the one GPU of its rank; before torch looks for GPUs.

    Raises:
        NoGpuError: there are fewer.
    """
    gpu = own_gpu(int(os.environ["LOCAL_RANK"]), os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu


def own_gpu(rank: int, visible: str) -> str:
    """Return the GPU of a process on this machine.

    Args:
        rank: of the process among those of the machine, from 0.
        visible: the GPUs that may be used, as CUDA_VISIBLE_DEVICES names them; empty for all.

    Raises:
        NoGpuError: there are fewer.
    """
    names = visible.split(",") if visible else [str(number) for number in range(rank + 1)]
    if rank >= len(names):
        raise NoGpuError(f"There is no GPU for process {rank + 1} of this machine: {len(names)} may be used.")
    return names[rank]
