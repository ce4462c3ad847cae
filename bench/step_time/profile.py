"""Where the time of a training goes: up to its tenth step by the functions of the pack, and in a step by kernels.

    python -m bench.step_time.profile --host path/to/ComfyUI [--cases sd15 sdxl flux] [--batch 1]

Models as in bench/step_time.py. A thread looks at what the processor does every 10 ms; what takes long on a GPU shows
in the kernels. In a fresh process on a fresh machine it is the start of the first training there.
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
from bench.step_time.clock import Clock, Enough
from bench.step_time.models import CASES, case_named
from launcher.inprocess import load_pack, open_host

_EVERY = 0.01  # seconds
_STEPS = 3  # that are profiled
_LINES = 30  # of a table


class Watch:
    """Looks at a thread's stack, and knows how long it was in each function of the pack."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._watched, self._over = threading.get_ident(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        before = time.perf_counter()
        while not self._over.wait(_EVERY):
            now = time.perf_counter()
            for place in places(sys._current_frames().get(self._watched)):
                self.seconds[place] += now - before
            before = now


def places(frame: Any) -> set[str]:
    """The functions of the pack that a stack goes through."""
    found = set()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if {"aclora_core", "nodes"} & set(path.parts) and "site-packages" not in path.parts:
            found.add(f"{path.parent.name}/{path.name}, {frame.f_code.co_name}")
        frame = frame.f_back
    return found


class ProfilingClock:
    """In a Clock's place: watches up to the tenth step, lets ten go by, and profiles some."""

    total = 20 + _STEPS

    def __init__(self, device: torch.device) -> None:
        self._clock, self._watch, self._done = Clock(device, 1, self.total), Watch(), 0
        kinds = torch.profiler.ProfilerActivity
        self._cuda = device.type == "cuda"
        self._profiler = torch.profiler.profile(activities=[kinds.CUDA if self._cuda else kinds.CPU])

    def start(self) -> None:
        self._clock.start()
        self._watch.start()

    def tick(self, loss: float = 0.0) -> None:
        self._done += 1
        if self._done <= 10:
            self._clock.tick(loss)
        if self._done == 10:
            self._watch.stop()
        if self._done == self.total - _STEPS:
            self._profiler.start()
        if self._done == self.total:
            if self._cuda:
                torch.cuda.synchronize()
            self._profiler.stop()
            raise Enough

    def print(self, title: str) -> None:
        """What was found."""
        seconds = self._clock.seconds
        print(f"\n### {title}: first step after {seconds['first']:.1f} s, tenth after {seconds['tenth']:.1f} s\n")
        for place, spent in self._watch.seconds.most_common(_LINES):
            print(f"{spent:8.2f} s  {place}")
        kind = "device_time_total" if self._cuda else "self_cpu_time_total"
        events = [(getattr(event, kind), event.count, event.key) for event in self._profiler.key_averages()]
        print(f"\n{sum(spent for spent, *_ in events) / 1000 / _STEPS:.2f} ms of kernels in a step; of these\n")
        for spent, count, name in sorted(events, reverse=True)[:_LINES]:
            print(f"{spent / _STEPS:10.1f} µs  {count / _STEPS:7.1f} ×  {name[:100]}")


def profile(training: Callable[[Any], None], device: torch.device, title: str) -> None:
    """Runs a training until its steps are profiled, and prints what came of it."""
    clock = ProfilingClock(device)
    try:
        training(clock)
    except Enough:
        clock.print(title)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.step_time.profile", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--host", type=Path, default=Path(".runtime/ComfyUI"))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["sd15"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="miniatures of the models, to try the script")
    args = parser.parse_args(words)
    open_host(args.host)
    pack = load_pack()
    import comfy.model_management

    device = comfy.model_management.get_torch_device()
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    for name in args.cases:
        case = case_named(name, args.tiny, memory)
        profile(ours.training(pack, case, args.batch, {}), device, f"{case.title}, batch {args.batch}")


if __name__ == "__main__":
    main()
