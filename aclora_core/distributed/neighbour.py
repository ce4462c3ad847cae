"""Notice that another process has ended while this one waits for it on its GPU.

NCCL waits inside a kernel that never ends where the other process of the same machine is gone, until torch's timeout.
gloo notices a closed connection at once. So a thread of each process waits for a message of the next one, which never
comes: what ends its wait is the end of that process. A process that ends because of it is noticed by the one before it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
import torch.distributed as dist


def watch_neighbour(group: dist.ProcessGroup, on_end: Callable[[], None]) -> None:
    """Call on_end in a thread of its own once the process of the next rank has ended.

    Args:
        group: a process group of gloo that nothing else uses.
        on_end: must not raise.
    """
    neighbour = (dist.get_rank() + 1) % dist.get_world_size()

    def wait() -> None:
        try:
            dist.recv(torch.empty(1), src=neighbour, group=group)
        except RuntimeError:  # the connection is closed
            on_end()

    threading.Thread(target=wait, name="AC-LoRA neighbour", daemon=True).start()
