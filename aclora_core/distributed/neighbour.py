"""Notice that another process of this machine has ended while this one waits for it on its GPU.

NCCL waits inside a kernel that never ends where the other process is gone, until torch's timeout. So each process holds
a connection to the next one, over which nothing is sent: what closes it is the end of that process. Then it closes its
own connection to the one before it, so that all know. NCCL notices by itself that another machine is gone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

from .processes import Processes


def watch_neighbour(processes: Processes, local_rank: int, local_size: int, on_end: Callable[[], None]) -> None:
    """Call on_end in a thread of its own once another process of this machine has ended.

    Args:
        processes: that train together.
        local_rank: of this process among those of this machine.
        local_size: how many these are.
        on_end: must not raise.

    Raises:
        OtherProcessError: another process has failed or ended.
    """
    with Listener() as listener:  # a socket of this machine, in a folder of this user
        addresses = processes.gather(listener.address)
        neighbour = processes.rank - local_rank + (local_rank + 1) % local_size
        ahead = Client(addresses[neighbour])
        behind = listener.accept()
    threading.Thread(target=_wait, args=(ahead, behind, on_end), name="AC-LoRA neighbour", daemon=True).start()


def _wait(ahead: Connection[Any, Any], behind: Connection[Any, Any], on_end: Callable[[], None]) -> None:
    with suppress(EOFError, OSError):
        ahead.recv()
    behind.close()
    on_end()
