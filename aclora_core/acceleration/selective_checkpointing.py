"""Selective activation checkpointing: what a recomputed block keeps, as it is small and took long to compute.

Of a transformer's block these are the output of its attention and that of a layer with a wide input, such as the last
one of its MLP (Korthikanti et al. 2022, arXiv 2205.05198, section 5, recomputes all but what is costly).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

_WIDER = 2  # a layer's output is kept if its input is at least this many times as wide

_running = threading.local()  # .selective: whether such a block runs in this thread; it is recomputed in another

_aten = torch.ops.aten
_PRODUCTS = _aten.mm.default, _aten.addmm.default  # their last two arguments are the matrices


def is_kept(inputs: int, outputs: int) -> bool:
    """Return whether the output of a layer is kept by the block that runs, so that it may not be changed in place."""
    return getattr(_running, "selective", False) and _is_costly(inputs, outputs)


def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the two contexts of a block, as torch.utils.checkpoint takes them: to run it, and to recompute it."""
    first, again = create_selective_checkpoint_contexts(_policy)
    return _marked(first), _marked(again)


@contextmanager
def _marked(mode: Any) -> Iterator[None]:
    with mode:
        _running.selective = True
        try:
            yield
        finally:
            _running.selective = False


def _is_costly(inputs: int, outputs: int) -> bool:
    return inputs >= _WIDER * outputs


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operation in _PRODUCTS:
        rows, columns = args[-2:]
        keep = _is_costly(rows.shape[1], columns.shape[1])
    else:
        keep = "scaled_dot_product" in str(operation)  # of each of PyTorch's attentions
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
