"""Measuring one kind of step: times between steps, peak memory, and failures as results."""

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
_LEAST_STEPS = 3  # timed ones, also when time is short


class Enough(Exception):
    """Raised in a training's callback when its steps have been timed, as the rest of it is of no use here."""


@dataclass
class Measured:
    """What came of timing one way to train."""

    case: str
    batch: int
    kind: str  # "native", "ours" or "bare"
    variant: str
    milliseconds: list[float] = field(default_factory=list)  # of every timed step
    seconds: dict[str, float] = field(default_factory=dict)  # up to the first step, the warm-up's last, the tenth
    memory_gb: float | None = None  # most that was allocated on the GPU at a time
    reserved_gb: float | None = None  # most that PyTorch had taken from the GPU
    said: list[str] = field(default_factory=list)  # by the pack's log
    failure: str = ""

    @property
    def median(self) -> float:
        """Milliseconds of a step; NaN where there is none."""
        return statistics.median(self.milliseconds) if self.milliseconds and not self.failure else math.nan


class Clock:
    """Counts steps and keeps the time between them, on the GPU's own clock where there is one."""

    def __init__(self, device: torch.device, warm_up: int, steps: int, most_seconds: float = math.inf) -> None:
        self.device, self.warm_up, self.total = device, warm_up, warm_up + steps
        self.seconds: dict[str, float] = {}
        self.last_loss = 0.0
        self._most_seconds = most_seconds
        self._marks: list[Any] = []
        self._began = time.perf_counter()

    def start(self) -> None:
        """The model is there; what comes now is the training."""
        self._synchronise()
        self._began = time.perf_counter()

    def tick(self, loss: float = 0.0) -> None:
        """A step is over. Raises Enough after the last."""
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
        late = time.perf_counter() - self._began > self._most_seconds and done >= self.warm_up + _LEAST_STEPS
        if late or done >= self.total:
            raise Enough

    def milliseconds(self) -> list[float]:
        """Of every step after the warm-up."""
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
    """Runs a training until its steps are timed, or until it fails; afterwards its memory is free again.

    Steps of an earlier round stay in the result.
    """
    cuda = clock.device.type == "cuda"
    with listening() as result.said:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated() / GB
            if held > 0.1:
                result.said.append(f"{held:.1f} GB were in use before this began")
        try:
            training(clock)
        except Enough:
            pass
        except Exception as error:  # every failure is a result of its own
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
    """A failure in one line."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:150]}"


def release() -> None:
    """Lets the host forget its models, and gives their memory back."""
    import comfy.model_management

    gc.collect()
    comfy.model_management.cleanup_models()
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()


@contextmanager
def listening() -> Iterator[list[str]]:
    """What the pack logs meanwhile."""
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
    """Operations a second of a large product, the median of some, and which product it was."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    clock = Clock(device, warm_up=3, steps=repeats)
    try:
        while True:
            left @ right
            clock.tick()
    except Enough:
        pass
    return 2 * side**3 / (statistics.median(clock.milliseconds()) / 1000), f"{side}³ {str(dtype)[6:]}"
