"""Time a training step of ComfyUI's own node, of a bare PyTorch loop, and of the pack without each optimization.

    python -m bench.step_time --host path/to/ComfyUI [--cases sdxl sd15 flux] [--batches 1 4] [--seconds 330]
    python -m bench.step_time --check [--cases sd15]
    python -m bench.step_time --against OTHER_CHECKOUT [--cases sd15 sdxl] [--batches 1] [--out FILE]

Real architectures with random weights (bf16 on a GPU), every Linear and convolution adapted at rank 16, AdamW. Prints a
table for each model and batch size, with ratios to the native node's best mode, and writes
bench/results/step_time_DEVICE.json after every row.

--check trains with and without CUDA graphs instead, and fails if the results differ. --against compares this checkout
with another one: each is timed in processes of its own, in turns. --tiny uses miniatures of the models, to try the
script itself; it writes a file only with --out.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench.step_time import aclora as ours
from bench.step_time import bare_loop as bare
from bench.step_time import check
from bench.step_time import native_node as native
from bench.step_time.clock import Clock, Measured, measure, peak_flops, sentence
from bench.step_time.compare_versions import compare_versions
from bench.step_time.models import CASES, Case, case_named, in_fp16
from bench.step_time.table import Table
from launcher.environment import ROOT
from launcher.inprocess import load_pack, open_host

Training = Callable[[Clock], None]
# Variants of the pack: settings of TrainConfig that differ from its defaults; WITHOUT names an optimization to disable.
VARIANTS: dict[str, dict[str, Any]] = {
    "ours, defaults": {},
    "ours, every block checkpointed": {"checkpointing": "all"},
    "ours, without graphs (eager)": {"graph": False},
    "ours, without kernels": {ours.WITHOUT: "kernels"},
    "ours, layers and branches apart": {ours.WITHOUT: "joint layers"},
    "ours, every layer by itself": {ours.WITHOUT: "siblings"},
    "ours, without cuDNN's attention": {ours.WITHOUT: "attention"},
}
BARE = "bare loop"
COMPILED = "bare loop, blocks compiled"  # only where --variants names it
_MAX_SECONDS = 40.0  # of one row; a slow one is timed over fewer steps
_DEFAULTS: dict[str, Any] = {"batches": [1, 4], "steps": 20, "rounds": 5, "seconds": math.inf}
_AGAINST_DEFAULTS = {"cases": ["sd15", "sdxl"], "batches": [1], "steps": 100, "rounds": 3, "seconds": 330.0}
_MIN_SECONDS = 8.0  # that must be left for a row to start


class Bench:
    """One run of the benchmark: its options, its time limit and its table."""

    def __init__(self, pack: ModuleType, args: argparse.Namespace, device: torch.device) -> None:
        self.pack, self.args, self.device = pack, args, device
        self.began = time.perf_counter()
        name = device_name(device)
        peak, product = peak_flops(device)
        print(f"\n{name}, torch {torch.__version__}: {peak / 1e12:.4g} TFLOP/s in a {product} matmul", flush=True)
        facts = {
            "device": name,
            "torch": torch.__version__,
            "peak_flops": peak,
            "peak_product": product,
            "options": {key: str(value) for key, value in vars(args).items() if not isinstance(value, Path)},
            "variants": VARIANTS,
        }
        self.table = Table(facts, results_file(args, device))

    def run(self) -> Table:
        """Time every case at every batch size and return the table."""
        for case in chosen_cases(self.args, self.device):
            self.table.add_case(case.name, title=case.title, flops=self._flops(case))
            for batch in self.args.batches:
                self._native(case, batch)
                self._ours(case, batch)
        self.table.print()
        return self.table

    def _flops(self, case: Case) -> int | None:
        try:
            return bare.counted_flops(case)
        except Exception as error:  # the step times can be measured without them
            print(f"  {case.name}: FLOPs could not be counted; {sentence(error)}", flush=True)
            return None

    def _native(self, case: Case, batch: int) -> None:
        for variant, mode in native.MODES.items():
            row = Measured(case.name, batch, "native", variant)
            self._add([(row, native.training(case, batch, mode))], warm_up=2, steps=self.args.native_steps)

    def _ours(self, case: Case, batch: int) -> None:
        rows = [(Measured(case.name, batch, "bare", BARE), bare.training(case, batch))]
        if self.device.type == "cuda" and COMPILED in (self.args.variants or ()):  # compiling takes minutes
            rows.append((Measured(case.name, batch, "bare", COMPILED), bare.training(case, batch, compiled=True)))
        for variant, settings in VARIANTS.items():
            if ours.WITHOUT in settings and batch != self.args.batches[0]:
                continue  # single optimizations are compared at one batch size
            row = Measured(case.name, batch, "ours", variant)
            missing = ours.unknown(self.pack, settings)
            row.failure = f"TrainConfig has no setting {', '.join(missing)}" if missing else ""
            rows.append((row, ours.training(self.pack, case, batch, settings)))
        # The speed of a CPU drifts, so there the bare loop and the pack take turns.
        together = 2 if self.device.type == "cpu" else 1
        for group in [rows[:together], *([row] for row in rows[together:])]:
            self._add(group, self.args.warm_up, self.args.steps, self.args.rounds if len(group) > 1 else 1)

    def _add(self, rows: list[tuple[Measured, Training]], warm_up: int, steps: int, rounds: int = 1) -> None:
        """Measure rows in turns and add them to the table."""
        wanted = [row for row in rows if not self.args.variants or row[0].variant in self.args.variants]
        for row, _ in wanted:
            row.failure = row.failure or self._reason_to_skip(row)
        for _ in range(rounds):
            for row, training in [turn for turn in wanted if not turn[0].failure]:
                seconds = min(_MAX_SECONDS / rounds, max(0.0, self._seconds_left()))
                each = math.ceil(steps / rounds)
                measure(row, Clock(self.device, warm_up, each, seconds), training)
        for row, _ in wanted:
            self.table.add(row)

    def _reason_to_skip(self, row: Measured) -> str:
        if self._seconds_left() < _MIN_SECONDS:
            return f"skipped: the time limit of {self.args.seconds:.0f} seconds is reached"
        same = [r for r in self.table.rows if (r.case, r.variant) == (row.case, row.variant) and r.batch < row.batch]
        return "skipped: out of memory at a smaller batch size" if any("memory" in r.failure for r in same) else ""

    def _seconds_left(self) -> float:
        return float(self.args.seconds) - (time.perf_counter() - self.began)


def chosen_cases(args: argparse.Namespace, device: torch.device) -> list[Case]:
    """Return the cases named in the options, or all that suit the device."""
    cuda = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if cuda else 0
    usual = ["sdxl", "sd15", "flux"] if cuda or args.tiny else []
    cases = [case_named(name, args.tiny, memory) for name in args.cases or [*usual, *([] if cuda else ["tiny"])]]
    if args.weights == "fp16":
        cases = [in_fp16(case) for case in cases]
    return cases


def device_name(device: torch.device) -> str:
    """Return the device's name for the head of a table."""
    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def results_file(args: argparse.Namespace, device: torch.device) -> Path | None:
    """Return the path of the JSON file; None for miniatures without --out."""
    usual = None if args.tiny else ROOT / "bench" / "results" / f"step_time_{device.type}.json"
    return args.out or usual


def parse_options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    variants = [*native.MODES, BARE, COMPILED, *VARIANTS]
    parser = argparse.ArgumentParser(prog="python -m bench.step_time", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--host", type=Path, default=Path(".runtime/ComfyUI"))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), help="by default all that suit the device")
    parser.add_argument("--batches", nargs="+", type=int, help="images in a step (1 4; 1 with --against)")
    parser.add_argument("--variants", nargs="+", choices=variants, metavar="NAME", help=f"of {', '.join(variants)}")
    parser.add_argument("--steps", type=int, help="timed steps (20; 100 with --against)")
    parser.add_argument("--warm-up", type=int, default=10, help="steps before the timed ones")
    parser.add_argument("--native-steps", type=int, default=8, help="timed steps of ComfyUI's own node")
    parser.add_argument(
        "--rounds", type=int, help="turns on a CPU of ours and the bare loop, 5; with --against of both versions, 3"
    )
    parser.add_argument(
        "--seconds", type=float, help="after these no row, or round with --against, begins; that has 330"
    )
    parser.add_argument("--out", type=Path, help="the JSON file")
    parser.add_argument("--weights", choices=["bf16", "fp16"], default="bf16", help="dtype of the models on a GPU")
    parser.add_argument("--tiny", action="store_true", help="miniatures of the models, to try the script")
    parser.add_argument("--check", action="store_true", help="compare training with and without CUDA graphs")
    names = [check.GRADIENTS, *(scenario.name for scenario in check.SCENARIOS)]
    parser.add_argument(
        "--scenarios", nargs="+", choices=names, metavar="NAME", default=[], help="of --check; by default all"
    )
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="compare with this other checkout of the pack")
    args = parser.parse_args(words)
    for name, value in (_AGAINST_DEFAULTS if args.against else _DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def check_graphs(pack: ModuleType, args: argparse.Namespace, device: torch.device) -> bool:
    """Return whether training with CUDA graphs agrees with eager training."""
    small = argparse.Namespace(**{**vars(args), "cases": args.cases or ["sd15" if device.type == "cuda" else "tiny"]})
    print(f"\nWith and without CUDA graphs, {check.STEPS} steps, {device_name(device)}", flush=True)
    return check.run(pack, chosen_cases(small, device), wanted=args.scenarios)


def main() -> None:
    args = parse_options()
    if args.against:
        if not all(comparison.ratio for comparison in compare_versions(args)):
            sys.exit("A version could not be timed; see the failures above.")
        return
    open_host(args.host)
    pack = load_pack()
    import comfy.model_management

    device = comfy.model_management.get_torch_device()
    if not args.check:
        Bench(pack, args, device).run()
    elif not check_graphs(pack, args, device):
        sys.exit("Training with CUDA graphs and eager training differ; see the lines marked WRONG above.")


if __name__ == "__main__":
    main()
