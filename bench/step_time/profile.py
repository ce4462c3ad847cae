"""Profile a training: the start, up to the tenth step, by the pack's functions, and a step by kernels.

    python -m bench.step_time.profile --host path/to/ComfyUI [--cases sd15 sdxl flux_fp8] [--batch 1] [--recompute]

The models are those of bench.step_time. The start is sampled: a thread reads the main thread's stack every 10 ms. GPU
time shows in the kernels. To profile the first training on a machine, use a new process and an empty kernel cache.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.step_time import aclora as ours
from bench.step_time.clock import Clock, TimingComplete
from bench.step_time.models import case_named
from launcher.inprocess import load_pack, open_host

_INTERVAL = 0.01  # seconds between two samples
_STEPS = 3  # profiled steps
_LINES = 30  # rows of a table


class StackSampler:
    """Sample the stack of the current thread and sum the seconds spent in each function of the pack."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._sampled, self._stopped = threading.get_ident(), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _sample(self) -> None:
        before = time.perf_counter()
        while not self._stopped.wait(_INTERVAL):
            now = time.perf_counter()
            for function in pack_functions(sys._current_frames().get(self._sampled)):
                self.seconds[function] += now - before
            before = now


def pack_functions(frame: Any) -> set[str]:
    """Return the functions of the pack on a stack."""
    found = set()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if {"aclora_core", "nodes"} & set(path.parts) and "site-packages" not in path.parts:
            found.add(f"{path.parent.name}/{path.name}, {frame.f_code.co_name}")
        frame = frame.f_back
    return found


class ProfilingClock:
    """A Clock that samples the stack up to the tenth step, skips ten steps and profiles the last three."""

    total = 20 + _STEPS + 1  # the last step, after which the images are measured, is not profiled

    def __init__(self, device: torch.device) -> None:
        self._clock, self._sampler, self._done = Clock(device, 1, self.total), StackSampler(), 0
        kinds = torch.profiler.ProfilerActivity
        self._cuda = device.type == "cuda"
        self._profiler = torch.profiler.profile(activities=[kinds.CUDA if self._cuda else kinds.CPU])

    def start(self) -> None:
        self._clock.start()
        self._sampler.start()

    def tick(self, loss: float = 0.0) -> None:
        self._done += 1
        if self._done <= 10:
            self._clock.tick(loss)
        if self._done == 10:
            self._sampler.stop()
        if self._done == self.total - 1 - _STEPS:
            self._profiler.start()
        if self._done == self.total - 1:
            if self._cuda:
                torch.cuda.synchronize()
            self._profiler.stop()
            raise TimingComplete

    def print(self, title: str, lines: int) -> None:
        """Print both profiles."""
        seconds = self._clock.seconds
        print(f"\n### {title}: first step after {seconds['first']:.1f} s, tenth after {seconds['tenth']:.1f} s\n")
        for function, spent in self._sampler.seconds.most_common(lines):
            print(f"{spent:8.2f} s  {function}")
        kind = "device_time_total" if self._cuda else "self_cpu_time_total"
        events = [(getattr(event, kind), event.count, event.key) for event in self._profiler.key_averages()]
        print(f"\n{sum(spent for spent, *_ in events) / 1000 / _STEPS:.2f} ms of kernels in a step; of these\n")
        for spent, count, name in sorted(events, reverse=True)[:lines]:
            print(f"{spent / _STEPS:10.1f} µs  {count / _STEPS:7.1f} ×  {name[:100]}")


def profile(training: Callable[[Any], None], device: torch.device, title: str, lines: int = _LINES) -> None:
    """Run a training until its steps are profiled and print the profile."""
    clock = ProfilingClock(device)
    try:
        training(clock)
    except TimingComplete:
        clock.print(title, lines)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.step_time.profile", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--host", type=Path, default=Path(".runtime/ComfyUI"))
    parser.add_argument("--cases", nargs="+", default=["sd15"], help="of bench.step_time, also with _fp8 or _fp16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing of every block")
    parser.add_argument("--lines", type=int, default=_LINES, help="rows of a table")
    parser.add_argument("--tiny", action="store_true", help="miniatures of the models, to try the script")
    args = parser.parse_args(words)
    open_host(args.host)
    pack = load_pack()
    import comfy.model_management

    device = comfy.model_management.get_torch_device()
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    for name in args.cases:
        case = case_named(name, args.tiny, memory)
        settings = {"checkpointing": "all"} if args.recompute else {}
        title = f"{case.title}, batch {args.batch}{', recomputed' if args.recompute else ''}"
        profile(ours.training(pack, case, args.batch, settings), device, title, args.lines)


if __name__ == "__main__":
    main()
