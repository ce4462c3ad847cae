"""Steps that fit into memory: blocks that are computed twice, and pictures that go through the model in smaller parts.

Nothing of it changes what is learned: a step's pictures, their noise and what they weigh stay the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from ..acceleration import ActivationCheckpointing
from ..diffusion import Batch, Model
from ..optim import Loss, Stepper
from .batches import BatchStream, largest_batch, split_rows

if TYPE_CHECKING:
    from .progress import Progress

log = logging.getLogger("aclora")


class MemoryPlan:
    """Plans what a pass's steps take, and has less of it at a time where they run out of memory all the same."""

    def __init__(
        self, model: Model, memory: ActivationCheckpointing, stepper: Stepper, drawing: BatchStream, progress: Progress
    ) -> None:
        self.model, self.memory, self.stepper, self.drawing = model, memory, stepper, drawing
        self.progress = progress

    def plan(self, pictures: Sequence[int], loss_of: Loss) -> None:
        """Sees to it that the largest batch fits on the CUDA device, and says what it takes."""
        rows, picture = largest_batch(pictures, self.model, self.drawing.rows)
        row = self.drawing.trial(picture)
        kept = self.memory.measure(lambda: loss_of(row))
        free = self.model.free_memory(kept.peak(rows, set()))
        if free is None:
            return
        expected, fewer = self.memory.fit(kept, rows, free)
        twice = f"{len(self.memory.recomputed)} of {len(self.memory.blocks)} blocks computed twice"
        if fewer < rows:
            self.drawing.rows = fewer
            twice += f", pictures {fewer} at a time"
        self.progress.memory = f"a step takes some {expected / 1e9:.1f} GB of {free / 1e9:.1f} GB free, {twice}"
        log.info("AC-LoRA: %s.", self.progress.memory)

    def step(self, batches: Sequence[Batch], meanwhile: Callable[[], Sequence[Batch]], automatic: bool) -> float:
        """One step; when it does not fit, once more with less at a time, where that is left to us."""
        while True:
            # Those that were drawn ahead may be larger than what was found to fit since.
            batches = [part for batch in batches for part in split_rows(self.model, batch, self.drawing.rows)]
            try:
                return self.stepper.step(batches, meanwhile)
            except torch.cuda.OutOfMemoryError:
                sentence = self._less(max(len(batch.sigma) for batch in batches)) if automatic else ""
                if not sentence:
                    raise
            log.info("AC-LoRA: %s", sentence)
            self.progress.note(sentence)
            self.stepper.graphs.clear()
            self.stepper.clear_gradients()
            meanwhile = _nothing

    def _less(self, rows: int) -> str:
        """Has a step of so many rows at once take less, and says how; nothing where there is nothing left to do."""
        if self.memory.recompute_all():
            return "Out of memory: each block is computed twice from now on, which needs less and is slower."
        if rows < 2:
            return ""
        self.drawing.rows = rows // 2
        return (
            f"Out of memory: pictures go through the model {rows // 2} at a time from now on, which needs less and is "
            "slower."
        )


def _nothing() -> Sequence[Batch]:
    return ()
