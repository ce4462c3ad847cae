"""Steps that fit into memory: recomputed blocks, and micro-batches that go through the model in smaller parts.

This changes nothing of what is learned: a step's images, their noise and their weights stay the same.
"""

from __future__ import annotations

import itertools
import logging
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from typing import TypeVar

import torch

from ..acceleration import (
    NO_COPIES,
    ActivationSizes,
    Copies,
    StepPlan,
    WeightStream,
    best_plan,
    given_plan,
    out_of_memory_named,
    room,
)
from ..diffusion import Batch
from ..optim import Stepper
from .adapted_model import AdaptedModel
from .batches import BatchStream, largest_batch, split_rows
from .progress import Progress
from .too_little_memory import TooLittleMemoryError

log = logging.getLogger("aclora")

Value = TypeVar("Value")

# Bytes: the run before a capture and the graph itself do not fit into each other's memory exactly.
_LEFT_FREE = 500 * 10**6
_BESIDE_COMPUTING = 1.1  # copies take this many times as long while something is computed (bench/README.md)
_TIMED = 10  # steps until the time of a step is known


class MemoryPlan:
    """Plans what a pass's steps need, and falls back to less where they run out of memory all the same.

    Args:
        adapted: the model and its adapter.
        stepper: takes the steps.
        stream: its micro-batches may be split.
        progress: gets the plan as a sentence.
        checkpointing: the setting; the plan is only ours to make where it is "automatic".
    """

    def __init__(
        self, adapted: AdaptedModel, stepper: Stepper, stream: BatchStream, progress: Progress, checkpointing: str
    ) -> None:
        self.adapted, self.stepper, self.stream, self.progress = adapted, stepper, stream, progress
        self.automatic = checkpointing == "automatic"
        self._plan = ""  # as a sentence, without the time of a step
        self._fallback = ""  # what changes after an attempt that ran out of memory
        self._ends: list[float] = []  # when steps ended, in seconds

    def make(self) -> None:
        """Choose the fastest way in which the largest batch fits on the CUDA device, and report what it needs.

        Raises:
            TooLittleMemoryError: one image does not fit.
        """
        model, checkpointing = self.adapted.model, self.adapted.checkpointing
        if model.device.type != "cuda" or not (self.automatic or model.weight_stream):
            return
        rows, index = largest_batch(self.stream.indices, self.stream.images, self.stream.rows)
        one_row = self.stream.trial(index)
        with out_of_memory_named():
            sizes = checkpointing.measure(lambda: self.adapted.loss(one_row)[0], self.adapted.graphs.in_pace)
        self.stepper.clear_gradients()
        kept = _LEFT_FREE + self._captions(index)
        found = model.free_memory(kept + room(sizes.peak(rows, set())))  # others make room for the fastest step
        if found is None:
            return
        if sizes.used > found:  # it has just run, so that free memory is limited by a setting
            raise TooLittleMemoryError(sizes.used - found, self.adapted)
        free = max(0, found - kept)
        copies = NO_COPIES
        if stream := model.weight_stream:
            plan, copies = self._stream_best(stream, sizes, rows, free)
            free = max(0, (model.free_memory(plan.peak) or 0) - kept)
        plan = self._planned(sizes, rows, free, checkpointing.required, copies)
        if self.automatic:
            checkpointing.use(plan)
            self.stream.rows = plan.rows
        self._plan = self._sentence(plan.peak, free, rows)
        seconds = self.stream.config.accumulate * plan.seconds
        timed = bool(sizes.forward) and self.adapted.graphs.active  # else the CPU sets the time
        self.progress.memory = f"{self._plan}, about {_duration(seconds)} a step" if timed else self._plan
        log.info("AC-LoRA: %s.", self.progress.memory)

    def _captions(self, index: int) -> int:
        """Return the bytes that the captions of a step take beside it, where text encoders learn.

        They are encoded before the step, all of them, with what the backward pass needs.

        index: of an image whose caption is measured.
        """
        if not self.adapted.model.text_encoders:
            return 0
        before = torch.cuda.memory_allocated()
        encoded = self.stream.images.conditioning([index])
        each = torch.cuda.memory_allocated() - before
        del encoded
        return each * self.stream.rows * self.stream.config.accumulate

    def _planned(
        self, sizes: ActivationSizes, rows: int, free: int, required: Set[int], copies: Copies = NO_COPIES
    ) -> StepPlan:
        """Return the best plan; that of the setting, if it is not ours to make. Arguments as in best_plan."""
        if self.automatic:
            return best_plan(sizes, rows, free, required, copies)
        recomputed = self.adapted.checkpointing.recomputed | required
        return given_plan(sizes, rows, rows, free, recomputed, copies=copies)

    def _stream_best(
        self, stream: WeightStream, sizes: ActivationSizes, rows: int, free: int
    ) -> tuple[StepPlan, Copies]:
        """Stream the blocks with which a step takes the least time; of equal ways that which streams least.

        Weights that are kept save copies, and activations that are kept save computing; both need the same memory.

        Returns:
            The plan of the step, and the copies in each pass.
        """
        rate, slower = stream.measured_rate(), _BESIDE_COMPUTING if stream.all_pinned else 1.0
        ways = []
        for way in stream.choices():
            copies = Copies(slower * way.copied / rate, stream.all_pinned)
            required = self.adapted.recomputed_if_streamed(way.indices)
            ways.append((self._planned(sizes, rows, free - way.more, required, copies), copies, way))
        fitting = [way for way in ways if way[0].fits] or ways[-1:]  # all streamed, if nothing fits
        plan, copies, best = min(fitting, key=lambda way: way[0].seconds)
        stream.stream(best.indices)
        self.adapted.require_recomputing()
        return plan, copies

    def _sentence(self, expected: int, free: int, rows: int) -> str:
        checkpointing, stream = self.adapted.checkpointing, self.adapted.model.weight_stream
        parts = [f"a step takes some {expected / 1e9:.1f} GB of {free / 1e9:.1f} GB free"]
        if stream and stream.streamed:
            how = "" if stream.all_pinned else " (slowly, as main memory could not be pinned)"
            parts.append(f"the weights of {len(stream.streamed)} of {len(stream.blocks)} blocks streamed{how}")
        recomputed = checkpointing.recomputed | checkpointing.required
        in_part = len(recomputed & checkpointing.selective)
        selective = f" ({in_part} in part)" if in_part else ""
        parts.append(f"{len(recomputed)} of {len(checkpointing.blocks)} blocks recomputed{selective}")
        if self.stream.rows < rows:
            parts.append(f"images {self.stream.rows} at a time")
        return ", ".join(parts)

    def step_ended(self) -> None:
        """Put the measured time of a step into the plan's sentence, once it is known."""
        if not self.progress.memory or len(self._ends) > _TIMED:
            return
        self._ends.append(time.perf_counter())
        if len(self._ends) > _TIMED:
            seconds = statistics.median(later - earlier for earlier, later in itertools.pairwise(self._ends))
            self.progress.memory = f"{self._plan}, {_duration(seconds)} a step"
            log.info("AC-LoRA: %s a step.", _duration(seconds))

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
            self._fall_back()

    def retried(self, work: Callable[[], Value]) -> Value:
        """Return what work returns that is no step, such as a measurement.

        As long as memory runs out, it is done again in a way that needs less, with smaller micro-batches at last.
        """
        while True:
            with self.out_of_memory_caught(self.stream.rows):
                return work()
            self._fall_back()

    def _fall_back(self) -> None:
        log.info("AC-LoRA: %s", self._fallback)
        self.progress.note(self._fallback)
        self.progress.memory = ""  # the plan has failed
        self._fallback = ""
        self.stepper.clear_gradients()

    @contextmanager
    def out_of_memory_caught(self, rows: int) -> Iterator[None]:
        """Let what runs out of memory end quietly, where the next attempt needs less.

        Args:
            rows: of the largest micro-batch, which may be split.

        Raises:
            torch.cuda.OutOfMemoryError: nothing more can be done, or the plan is not ours to make.
        """
        try:
            with out_of_memory_named():
                yield
        except torch.cuda.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)  # these hold what the failed attempt has allocated
            self.adapted.graphs.clear()
            change = self._need_less(rows) if self.automatic else ""
            if not change:
                raise
            self._fallback = f"Out of memory: {change}."

    def _need_less(self, rows: int) -> str:
        """Make later steps of so many rows need less, and say what changes; empty where nothing more can be done."""
        if self.adapted.checkpointing.recompute_all():
            return "from now on, gradient checkpointing recomputes every block, which needs less memory and is slower"
        if (stream := self.adapted.model.weight_stream) and stream.stream_more():
            self.adapted.require_recomputing()
            blocks = f"{len(stream.streamed)} of {len(stream.blocks)} blocks"
            return f"the weights of {blocks} are streamed from now on, which is slower"
        if rows < 2:
            return ""
        self.stream.rows = rows // 2
        return f"images go through the model {rows // 2} at a time from now on, which needs less memory and is slower"


def _duration(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 2 else f"{seconds:.1f} s"
