"""The processes that run a workflow together, where torchrun has started several."""

from __future__ import annotations

import functools

from ...aclora_core.distributed import Processes, join


@functools.cache
def processes() -> Processes:
    """Return the processes that share the work of this one; without torchrun it is alone."""
    return join()
