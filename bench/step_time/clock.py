"""Time training steps: the time between steps, the peak memory, and failures as results."""

from __future__ import annotations

import gc
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

GB = 10**9
_MIN_STEPS = 3  # timed steps that a row gets even after its time limit


class TimingComplete(Exception):  # noqa: N818  # no error: it ends a training
    """Raised in a training's callback to end it when enough steps have been timed."""


@dataclass
class Measured:
    """The measurements of one variant at one batch size."""

    case: str
    batch: int
    kind: str  # "native", "ours" or "bare"
    variant: str
    milliseconds: list[float] = field(default_factory=list)  # of every timed step
    seconds: dict[str, float] = field(default_factory=dict)  # to the first step, the end of the warm-up, the tenth step
    memory_gb: float | None = None  # peak memory that PyTorch allocated on the GPU
    reserved_gb: float | None = None  # peak memory that PyTorch reserved on the GPU
    said: list[str] = field(default_factory=list)  # messages that the pack logged
    failure: str = ""

    @property
    def median(self) -> float:
        """Return the median step time in milliseconds; NaN after a failure or without a timed step."""
        return statistics.median(self.milliseconds) if self.milliseconds and not self.failure else math.nan


class Clock:
    """Measure the time between steps, on a GPU with CUDA events."""

    def __init__(self, device: torch.device, warm_up: int, steps: int, max_seconds: float = math.inf) -> None:
        self.device, self.warm_up, self.total = device, warm_up, warm_up + steps
        self.seconds: dict[str, float] = {}
        self.last_loss = 0.0
        self._max_seconds = max_seconds
        self._marks: list[Any] = []
        self._began = time.perf_counter()

    def start(self) -> None:
        """Start the clock; the model is loaded and the training begins."""
        self._synchronise()
        self._began = time.perf_counter()

    def tick(self, loss: float = 0.0) -> None:
        """Record the end of a step. Raises TimingComplete after the last."""
        self.last_loss = loss
        if self.device.type == "cuda":
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())
        done = len(self._marks)
        for name, step in (("first", 1), ("warm-up", self.warm_up), ("tenth", 10)):
            if done == step:
                self._synchronise()
                self.seconds[name] = time.perf_counter() - self._began
        late = time.perf_counter() - self._began > self._max_seconds and done >= self.warm_up + _MIN_STEPS
        if late or done >= self.total:
            raise TimingComplete

    def milliseconds(self) -> list[float]:
        """Return the time of every step after the warm-up, in milliseconds."""
        self._synchronise()
        marks = self._marks[self.warm_up - 1 :]
        pairs = zip(marks, marks[1:], strict=False)
        if self.device.type == "cuda":
            return [earlier.elapsed_time(later) for earlier, later in pairs]
        return [1000 * (later - earlier) for earlier, later in pairs]

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure(result: Measured, clock: Clock, training: Callable[[Clock], None]) -> Measured:
    """Run a training until its steps are timed or it fails, then free its memory; the measurements go into result.

    Steps of an earlier round stay in it.
    """
    cuda = clock.device.type == "cuda"
    with collect_log() as result.said:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated() / GB
            if held > 0.1:
                result.said.append(f"{held:.1f} GB of GPU memory were allocated before the training")
        try:
            training(clock)
        except TimingComplete:
            pass
        except Exception as error:  # a failure is a result too
            result.failure = sentence(error)
    if not math.isfinite(clock.last_loss):
        result.failure = result.failure or "the loss was not finite"
    if not result.failure:
        result.milliseconds += clock.milliseconds()
    result.seconds = result.seconds or clock.seconds
    if cuda:
        result.memory_gb = torch.cuda.max_memory_allocated() / GB
        result.reserved_gb = torch.cuda.max_memory_reserved() / GB
    release()
    return result


def sentence(error: Exception) -> str:
    """Return an error as one line of text."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:150]}"


def release() -> None:
    """Unload ComfyUI's models and free their memory."""
    import comfy.model_management

    gc.collect()
    comfy.model_management.cleanup_models()
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()


@contextmanager
def collect_log() -> Iterator[list[str]]:
    """Collect the messages that the pack logs in this block."""
    messages: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("aclora")
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


def peak_flops(device: torch.device, repeats: int = 10) -> tuple[float, str]:
    """Return the median FLOP/s of a large matrix product, and the product's size and dtype."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    clock = Clock(device, warm_up=3, steps=repeats)
    try:
        while True:
            left @ right
            clock.tick()
    except TimingComplete:
        pass
    return 2 * side**3 / (statistics.median(clock.milliseconds()) / 1000), f"{side}³ {str(dtype)[6:]}"
