"""Cancelled trainings, since ComfyUI started.

ComfyUI would return the result of a cancelled training from its cache, as nothing in its inputs has changed: the number
of cancels is part of what it compares. A cancel means the whole run, so trainings that have not begun do not begin.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .. import host

_LOOK = 0.25  # seconds between two looks for a cancel

_counts: Counter[str | None] = Counter()  # by node id
_cancelled_runs: set[str] = set()  # prompt ids


def record_cancel(node_id: str | None) -> None:
    """Record that a training ended early or did not begin, so that it runs when it is queued again."""
    _counts[node_id] += 1
    if (run := host.prompt_id()) is not None:
        _cancelled_runs.add(run)


def cancel_count(node_id: str | None) -> int:
    """Return how often this node's training was cancelled; ComfyUI trains anew where it has changed."""
    return _counts[node_id]


def run_was_cancelled() -> bool:
    """Return whether another training of this run was cancelled."""
    return host.prompt_id() in _cancelled_runs


@contextmanager
def noticed(tell: Callable[[], None]) -> Iterator[None]:
    """Call `tell` soon after the user presses Cancel in the block, which may be in a step that takes a minute."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_LOOK):
            if host.cancelled():
                tell()
                return

    watcher = threading.Thread(target=watch, name="AC-LoRA cancel", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
