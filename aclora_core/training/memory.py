"""Steps that fit into memory: recomputed blocks, and micro-batches that go through the model in smaller parts.

This changes nothing of what is learned: a step's images, their noise and their weights stay the same.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ..diffusion import Batch
from ..optim import Stepper
from .adapted_model import AdaptedModel
from .batches import BatchStream, largest_batch, split_rows
from .progress import Progress

log = logging.getLogger("aclora")

# The run before a capture and the graph itself do not fit into each other's memory exactly.
_LEFT_FREE = 500 * 10**6  # bytes


class MemoryPlan:
    """Plans what a pass's steps need, and falls back to less where they run out of memory all the same."""

    def __init__(
        self, adapted: AdaptedModel, stepper: Stepper, stream: BatchStream, progress: Progress, automatic: bool
    ) -> None:
        self.adapted, self.stepper, self.stream, self.progress = adapted, stepper, stream, progress
        self.automatic = automatic  # whether the plan is ours to make
        self._fallback = ""  # what changes after an attempt that ran out of memory

    def make(self) -> None:
        """Choose the fastest way in which the largest batch fits on the CUDA device, and report what it needs."""
        if not self.automatic or self.adapted.model.device.type != "cuda":
            return
        checkpointing = self.adapted.checkpointing
        rows, index = largest_batch(self.stream.indices, self.stream.images, self.stream.rows)
        one_row = self.stream.trial(index)
        sizes = checkpointing.measure(lambda: self.adapted.loss(one_row))
        free = self._plannable(sizes.peak(rows, set()))
        if free is None:
            return
        expected, fewer = checkpointing.fit(sizes, rows, free)
        if self._keep_weights(checkpointing.usable(free) - expected):
            free = self._plannable(expected) or 0
            expected, fewer = checkpointing.fit(sizes, rows, free)
        how = f"{len(checkpointing.recomputed)} of {len(checkpointing.blocks)} blocks recomputed"
        if (stream := self.adapted.model.weight_stream) and stream.streamed:
            how = f"the weights of {len(stream.streamed)} of {len(stream.blocks)} blocks streamed, {how}"
        if fewer < rows:
            self.stream.rows = fewer
            how += f", images {fewer} at a time"
        self.progress.memory = f"a step takes some {expected / 1e9:.1f} GB of {free / 1e9:.1f} GB free, {how}"
        log.info("AC-LoRA: %s.", self.progress.memory)

    def _plannable(self, wanted: int) -> int | None:
        """Return the bytes that a step may need, after others made room; None where nobody knows."""
        free = self.adapted.model.free_memory(wanted)
        return None if free is None else max(0, free - _LEFT_FREE)

    def _keep_weights(self, memory: int) -> bool:
        """Keep as many streamed blocks on the device as fit; return whether there are any to keep."""
        stream = self.adapted.model.weight_stream
        if stream is None:
            return False
        stream.keep_within(max(0, memory))
        self.adapted.require_recomputing()
        return True

    def attempts(self, batches: Sequence[Batch]) -> Iterator[list[Batch]]:
        """Yield the micro-batches of a step; again in a way that needs less, as long as memory ran out.

        The step is taken under out_of_memory_caught.
        """
        while True:
            # Batches that were prefetched may be larger than what was found to fit since.
            batches = [part for batch in batches for part in split_rows(self.stream.images, batch, self.stream.rows)]
            self._fallback = ""
            yield batches
            if not self._fallback:
                return
            log.info("AC-LoRA: %s", self._fallback)
            self.progress.note(self._fallback)
            self.adapted.graphs.clear()
            self.stepper.clear_gradients()

    @contextmanager
    def out_of_memory_caught(self, batches: Sequence[Batch]) -> Iterator[None]:
        """Let a step that runs out of memory end quietly, where the next attempt needs less.

        Raises:
            torch.cuda.OutOfMemoryError: nothing more can be done, or the plan is not ours to make.
        """
        try:
            yield
        except torch.cuda.OutOfMemoryError:
            self._fallback = (
                self._need_less(max((len(batch.sigma) for batch in batches), default=0)) if self.automatic else ""
            )
            if not self._fallback:
                raise

    def _need_less(self, rows: int) -> str:
        """Make later steps of so many rows need less, and return a sentence; empty where nothing more can be done."""
        if self.adapted.checkpointing.recompute_all():
            return "Out of memory: every block is recomputed from now on, which needs less memory and is slower."
        if (stream := self.adapted.model.weight_stream) and stream.stream_more():
            self.adapted.require_recomputing()
            blocks = f"{len(stream.streamed)} of {len(stream.blocks)} blocks"
            return f"Out of memory: the weights of {blocks} are streamed from now on, which is slower."
        if rows < 2:
            return ""
        self.stream.rows = rows // 2
        return (
            f"Out of memory: images go through the model {rows // 2} at a time from now on, which needs less memory "
            "and is slower."
        )
