"""Train with little free GPU memory: step times, and what is streamed, recomputed and needed.

    python -m bench.memory --cases sd15 sdxl flux --seconds 500      # on a CUDA GPU

Models have random weights in their true shapes (bench/step_time/models.py). Memory beyond what a row leaves free is
occupied by another process. Each case is timed without a limit first, with every block recomputed; the losses of the
other rows are compared with its losses. Batch size 1. bench.memory.server times ComfyUI's own node beside ours.
Rows that --out holds already stay there, unless they are measured anew. Writes bench/results/memory_cuda.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import torch

from bench.memory.ballast import left_free
from bench.memory.cases import LIMITS, case_of
from bench.no_search.tables import markdown
from bench.step_time.aclora import PLAIN
from bench.step_time.clock import GB, Clock, Measured, measure
from bench.step_time.models import GIB, Case, build_model, random_dataset
from bench.training_session import make_config, training_session
from launcher.environment import ROOT
from launcher.inprocess import load_pack, open_host

_COMPARED = 10  # steps whose losses are compared


@dataclass
class Row(Measured):
    """One training with a limit."""

    free_gib: float | None = None
    losses: list[float] = field(default_factory=list)
    weights_gb: float = 0.0
    streamed_gb: float = 0.0  # bytes of the streamed blocks, which come twice a step
    main_memory_gb: float = 0.0  # resident size of the process while it trains; 0 where it was not measured
    date: str = ""  # when it was measured


def weights_in_main_memory(case: Case) -> Any:
    """Return the MODEL of a case with random weights in main memory, as a loader gives it."""
    import comfy.model_patcher

    base = build_model(case, disable_dynamic=True).model
    base.to("cpu")
    base.device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(base, torch.device("cuda"), torch.device("cpu"))


def host_to_device_rate() -> float:
    """Return how many GB a second come from pinned main memory, the median of five copies of 1 GiB."""
    source = torch.empty(GIB, dtype=torch.uint8, pin_memory=True)
    target, seconds = torch.empty_like(source, device="cuda"), []
    for _ in range(6):
        torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return GIB / GB / statistics.median(seconds[1:])


def run_row(pack: ModuleType, model: Any, case: Case, row: Row, settings: dict[str, Any], steps: int) -> None:
    """Train with the row's limit, and put what was measured into the row."""
    latents, captions = random_dataset(case)

    def training(clock: Clock) -> None:
        with torch.inference_mode(), left_free(row.free_gib):
            clock.start()
            with training_session(pack, model, latents, captions) as session:
                settings_of_row = {**PLAIN, "batch_size": 1, "steps": clock.total, **settings}
                config = make_config(pack, **settings_of_row)

                def on_step(progress: Any) -> None:
                    row.losses = list(progress.losses[:_COMPARED])
                    stream = session.network.weight_stream
                    sizes = stream.sizes if stream else []
                    row.streamed_gb = sum(sizes[index] for index in stream.streamed) / GB if stream else 0.0
                    if progress.done == _COMPARED:
                        row.main_memory_gb = psutil.Process().memory_info().rss / GB
                        torch.cuda.reset_peak_memory_stats()
                    clock.tick(progress.losses[-1])

                session.train(config, on_step=on_step)

    measure(row, Clock(torch.device("cuda"), warm_up=_COMPARED, steps=steps, max_seconds=60), training)
    with torch.inference_mode():  # the mode in which the weights were made
        model.unpatch_model(torch.device("cpu"))
    row.weights_gb = model.model_size() / GB
    row.date = time.strftime("%Y-%m-%d")


def rows_of(case: Case, limits: Sequence[float]) -> list[tuple[Row, dict[str, Any]]]:
    """Return the rows of a case with their settings: all recomputed without a limit, and each limit."""
    found = [(Row(case.name, 1, "ours", "all recomputed"), {"checkpointing": "all"})]
    for limit in limits:
        found.append((Row(case.name, 1, "ours", f"{limit:g} GiB free", free_gib=limit), {}))
    return found


def largest_difference(row: Row, other: Row) -> float:
    """Return the largest relative difference of two rows' first losses."""
    pairs = list(zip(row.losses, other.losses, strict=False))
    return max((abs(a - b) / max(abs(b), 1e-9) for a, b in pairs), default=float("nan"))


def table(rows: list[Row], rate: float) -> str:
    """Return the rows as Markdown, with the floor that the aims are relative to."""
    lines = []
    for row in rows:
        full = next((each for each in rows if (each.case, each.variant) == (row.case, "all recomputed")), None)
        floor = max(full.median, 2 * row.streamed_gb / rate * 1000) if full else math.nan
        ours = row.kind == "ours"
        lines.append(
            [
                row.case,
                row.variant,
                row.failure or f"{row.median:.1f}",
                f"{row.median / floor:.2f}" if ours and row.free_gib and not row.failure else "",
                f"{row.streamed_gb:.1f} of {row.weights_gb:.1f}" if ours else "",
                f"{row.reserved_gb or 0:.1f}" if ours else "",
                f"{row.main_memory_gb:.0f}" if row.main_memory_gb else "",
                f"{100 * largest_difference(row, full):.2f} %" if ours and full else "",
                next((said for said in row.said if "takes some" in said), ""),
                row.date,
            ]
        )
    header = [
        "model",
        "",
        "ms a step",
        "to the floor",
        "GB streamed",
        "GPU memory, GB",
        "main memory, GB",
        "losses",
        "plan",
        "date",
    ]
    return markdown(header, lines)


def table_of(out: Path) -> str:
    """Return the table of a file."""
    measured = json.loads(out.read_text(encoding="utf-8"))
    return table([Row(**row) for row in measured["rows"]], measured["rate_gb_s"])


def rows_in(out: Path) -> list[dict[str, Any]]:
    """Return the rows of a file; none if it does not exist."""
    return list(json.loads(out.read_text(encoding="utf-8"))["rows"]) if out.is_file() else []


def is_measured(row: Row, out: Path) -> bool:
    """Return whether a file has the row, without a failure."""
    found = {(each["case"], each["variant"]) for each in rows_in(out) if not each["failure"]}
    return (row.case, row.variant) in found


def save(rows: list[Row], rate: float, out: Path) -> None:
    """Write the rows; those of other cases that the file holds stay."""
    measured = {(row.case, row.variant) for row in rows}
    kept = [row for row in rows_in(out) if (row["case"], row["variant"]) not in measured]
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rate_gb_s": rate}
    results = {**facts, "date": time.strftime("%Y-%m-%d"), "rows": [*kept, *[asdict(row) for row in rows]]}
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--host", type=Path, default=Path(".runtime/ComfyUI"))
    parser.add_argument("--cases", nargs="+", choices=list(LIMITS), default=["sd15", "sdxl", "flux"])
    parser.add_argument("--free", type=float, nargs="+", help="GiB: these limits instead")
    parser.add_argument("--keep-reference", action="store_true", help="keep rows without a limit that --out holds")
    parser.add_argument("--table", action="store_true", help="print the table of --out and measure nothing")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--seconds", type=float, default=540.0, help="after these no row begins")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "memory_cuda.json")
    args = parser.parse_args()
    began = time.perf_counter()
    if args.table:
        print(table_of(args.out))
        return
    open_host(args.host)
    pack = load_pack()
    rate, rows = host_to_device_rate(), list[Row]()

    def note(text: str) -> None:
        print(f"{time.perf_counter() - began:6.1f} s {text}", flush=True)

    print(f"{torch.cuda.get_device_name()}, host to device {rate:.1f} GB/s", flush=True)
    for name in args.cases:
        case = case_of(name)
        with torch.inference_mode():
            model = weights_in_main_memory(case)
        note(f"{name}: the model is made")
        for row, settings in rows_of(case, args.free or LIMITS[name]):
            if args.keep_reference and row.free_gib is None and is_measured(row, args.out):
                continue
            if time.perf_counter() - began > args.seconds:
                row.failure = f"skipped: the time limit of {args.seconds:.0f} seconds is reached"
            else:
                run_row(pack, model, case, row, settings, args.steps)
            rows.append(row)
            note(f"{name}, {row.variant}: {row.failure or row.median}")
            for said in row.said:
                print(f"    {said}", flush=True)
            save(rows, rate, args.out)
        del model
    print(table_of(args.out))


if __name__ == "__main__":
    main()
