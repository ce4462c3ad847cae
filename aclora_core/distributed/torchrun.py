"""Join the processes that torchrun has started."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from .neighbour import watch_neighbour
from .processes import ALONE, Processes

# The first process draws previews while the others wait for it. One that has ended is noticed at once all the same.
_PATIENCE = timedelta(minutes=60)
_IDLE_PATIENCE = timedelta(days=7)
_DATA_PATIENCE = timedelta(minutes=2)  # gradients come right after a vote, so that nobody has to wait for them


def join(environment: Mapping[str, str] = os.environ) -> Processes:
    """Return the processes that torchrun has started, with which this one is then connected; ALONE without torchrun.

    Args:
        environment: how many there are and where, as torchrun sets it. Other programs set some of it as well, so the
            name of torchrun's run has to be there.
    """
    if "TORCHELASTIC_RUN_ID" not in environment or environment["WORLD_SIZE"] == "1":
        return ALONE
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=_PATIENCE)
    control = dist.new_group(backend="gloo", timeout=_PATIENCE)
    on_gpu = torch.cuda.is_available() and dist.is_nccl_available()
    data = dist.new_group(backend="nccl", timeout=_DATA_PATIENCE) if on_gpu else control
    idle = dist.new_group(backend="gloo", timeout=_IDLE_PATIENCE)
    processes = Processes(dist.get_rank(), dist.get_world_size(), control, data, idle)
    if data is not control:
        # Whatever waits for the other process on the GPU ends then, and the next vote says that it is gone.
        local_rank, local_size = int(environment["LOCAL_RANK"]), int(environment["LOCAL_WORLD_SIZE"])
        watch_neighbour(processes, local_rank, local_size, data.abort)
    return processes
