"""Compare AC-LoRA with one setting, trained on 16 images, with the best of a grid of ranks and steps.

    python -m bench.no_search --prepare .runtime/no_search.zip                  # needs npm for the icons
    python -m bench.no_search --data .runtime/no_search.zip --processes 8 [--seconds 300]
    python -m bench.no_search --table RESULTS.json [MORE.json ...]

Four styles that the tiny base was not trained on, each with 16 training images and 240 test images ("verdict"), which
neither training nor validation uses; three seeds. The grid is plain LoRAs of fixed ranks on all 16 images; its best
rank and step are chosen on the test images. Writes bench/results/no_search.json after every job and prints the tables.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bench.no_search import images, tables
from bench.no_search.jobs import Job, marks_up_to, ordered
from bench.no_search.verdict import Results, join
from bench.pool import Row
from bench.result_file import write
from bench.run_log import RunLog
from launcher.environment import ROOT

RANKS = (1, 2, 4, 8, 16, 32, 64)
MARKS = (13, 25, 38, 50, 75, 100, 125, 150, 200, 250, 300, 400, 500, 600)
SEEDS = (0, 1, 2)

# TrainConfig's defaults in 0.3.0, which all of these were compared with.
DEFAULTS_0_3: dict[str, Any] = {
    "layers": "attention and feed-forward",
    "restart_every": 10,
    "threshold": "dynamic",
    "timesteps": "logit-normal",
}

# Settings of TrainConfig. Each mode is run with each variant, the most informative ones first.
VALIDATED = {"steps": 600, "held_out": 0.2, "stop_early": True, "smallest": True, "refit": True}
RESTARTS = ("paper", "product", "product_redraw")
VARIANTS: dict[str, tuple[Sequence[str], dict[str, Any]]] = {
    "rank 16": ((*RESTARTS, "off"), {"max_rank": 16}),
    "rank 64": ((*RESTARTS, "off"), {"max_rank": 64}),
    "rank 16, no refit": ((*RESTARTS, "off"), {"max_rank": 16, "refit": False}),
    "rank 64, no refit": ((*RESTARTS, "off"), {"max_rank": 64, "refit": False}),
    "rank 16, noise floor": (("paper",), {"max_rank": 16, "threshold": "noise floor"}),
    "rank 32, noise floor": (("paper",), {"max_rank": 32, "threshold": "noise floor"}),
    "rank 64, noise floor": (RESTARTS, {"max_rank": 64, "threshold": "noise floor"}),
    "rank 64, fixed 0.9": (RESTARTS, {"max_rank": 64, "threshold": "fixed", "fixed_threshold": 0.9}),
    "rank 16, no validation": (RESTARTS, {"max_rank": 16, "held_out": 0.0, "steps": 150}),
}
SETTINGS = {
    f"{mode}, {name}": {**VALIDATED, "mode": mode, **values}
    for name, (modes, values) in VARIANTS.items()
    for mode in modes
}


class Run(RunLog):
    """The losses of a run; written after every row."""

    def outcome(self, row: Row) -> str:
        """Return the loss, or why there is none."""
        loss = row.get("loss")
        return str(row.get("error", "the loss is not finite")) if loss is None else f"loss {loss:.4f}"


def planned_jobs(args: argparse.Namespace, styles: Sequence[str], common: dict[str, Any]) -> list[Job]:
    """Return the jobs that the options select."""
    unknown = [style for style in args.styles or [] if style not in styles]
    if unknown:
        sys.exit(f"{args.data} has no {', '.join(unknown)}; it has: {', '.join(styles)}")
    patterns = args.settings
    chosen = {
        name: {**setting, "steps": min(setting["steps"], args.steps)}
        for name, setting in SETTINGS.items()
        if patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    for pattern in patterns or []:
        if not any(fnmatchcase(name, pattern) for name in SETTINGS):
            sys.exit(f"No setting is called {pattern!r}; there are:\n  " + "\n  ".join(SETTINGS))
    marks = marks_up_to(MARKS, args.steps)
    return ordered(args.styles or styles, args.seeds, args.ranks, chosen, common, marks, args.alpha_is_rank)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the jobs on the images of a file and return the results."""
    # Imported here: every worker process imports this file, and the tables do not need torch.
    import torch

    from bench.no_search.worker import serve
    from bench.pool import Place, gpus, run_all

    deadline = time.monotonic() + args.seconds
    styles = images.read(args.data)
    counts = {name: [len(style.training.captions), len(style.verdict.captions)] for name, style in styles.items()}
    options = {
        "layers": args.layers,
        "learning_rate": args.learning_rate,
        "batch_size": args.batch_size,
        "alpha": args.alpha,
    }
    common = DEFAULTS_0_3 | {name: value for name, value in options.items() if value is not None}
    jobs = planned_jobs(args, list(styles), common)
    threads = max(1, (os.cpu_count() or 1) // args.processes)
    places = [Place(args.host, args.data, gpu, threads) for gpu in gpus(args.processes, torch.cuda.device_count())]
    facts = {
        "data": images.digest(styles),
        "pictures": counts,
        "common": common,
        "settings": SETTINGS,
        "processes": args.processes,
    }
    results = Run(facts, args.out, len(jobs))
    left = run_all(jobs, places, serve, results.started, results.add, deadline)
    if left:
        print(f"{left} jobs were not started: the time limit was reached, or every process had died.", flush=True)
    return {**results.facts, "rows": results.rows}


def make_images(args: argparse.Namespace, path: Path) -> None:
    """Fetch the icons and write the images into a file."""
    styles = args.styles or images.STYLES
    images.prepare(args.icons, path, styles, args.training, args.verdict, args.choice)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {', '.join(styles)}")


def parse_options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.no_search", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--host", type=Path, default=Path(".runtime/ComfyUI"))
    parser.add_argument("--data", type=Path, default=Path(".runtime/no_search.zip"), help="the images")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "no_search.json")
    parser.add_argument("--processes", type=int, default=1, help="number of processes that train in parallel")
    parser.add_argument("--seconds", type=float, default=math.inf, help="time limit after which no job starts")
    parser.add_argument("--styles", nargs="+", help="by default all of the file")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--ranks", nargs="*", type=int, default=list(RANKS), help="of the grid")
    parser.add_argument("--settings", nargs="*", metavar="NAME", help='such as "paper, *"; by default all')
    parser.add_argument("--steps", type=int, default=MARKS[-1], help="maximum steps of a training")
    for name, kind in (("layers", str), ("learning-rate", float), ("batch-size", int), ("alpha", float)):
        parser.add_argument(f"--{name}", type=kind, help="for every training; by default as in 0.3.0")
    parser.add_argument("--alpha-is-rank", action="store_true", help="alpha = rank in the grid, as in most trainers")
    making = parser.add_argument_group("preparing the images")
    making.add_argument("--prepare", type=Path, metavar="FILE", help="only write the images into FILE")
    making.add_argument("--icons", type=Path, default=Path(".runtime/icons"), help="folder for the icon packages")
    making.add_argument("--training", type=int, default=16, help="training images of each style")
    making.add_argument("--verdict", type=int, default=240, help="test images of each style")
    making.add_argument("--choice", type=int, default=0, help="seed that chooses the images")
    parser.add_argument(
        "--table",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="print the tables of results; several are joined and written to --out",
    )
    return parser.parse_args(words)


def main() -> None:
    args = parse_options()
    if args.table:
        found = join([json.loads(path.read_text(encoding="utf-8")) for path in args.table])
        if args.out not in args.table and len(args.table) > 1:
            write(args.out, found)
    elif args.prepare:
        make_images(args, args.prepare)
        return
    else:
        if not args.data.is_file():
            make_images(args, args.data)
        found = run(args)
    print("\n" + tables.report(Results(found["rows"])))


if __name__ == "__main__":
    main()
