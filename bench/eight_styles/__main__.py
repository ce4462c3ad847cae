"""Train adapters on eight styles, draw test captions with them, and measure what was drawn.

    python -m bench.eight_styles --prepare .runtime/eight_styles.zip    # needs npm for the icons
    python -m bench.eight_styles --data FILE --plan table --processes 24 [--seconds 500]
    python -m bench.eight_styles --table RESULTS.json [MORE.json ...]
    python -m bench.eight_styles --stop RESULTS.json
    python -m bench.eight_styles --figure OUT.webp RESULTS.json --styles STYLE --lines "real images" "rank 16, *"
    python -m bench.eight_styles --without-images SMALL.json RESULTS.json [MORE.json ...]

Writes bench/results/eight_styles_PLAN.json after every job; it holds drawn images, which --without-images removes.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bench.eight_styles import explore, plan
from bench.eight_styles.jobs import Job
from bench.pool import Row
from bench.run_log import RunLog
from launcher.environment import ROOT

PLANS = {"explore": explore.jobs, "table": plan.jobs}


class Run(RunLog):
    """The drawn images of a run and their measures."""

    pause = 20.0  # the file is large

    def outcome(self, row: Row) -> str:
        """Return some measures of each cell, or why there are none."""
        return str(row.get("error") or ", ".join(_brief(*cell) for cell in row["cells"].items()))


def _brief(step: str, cell: dict[str, Any]) -> str:
    return f"{step} {cell['style']:.2f}/{cell['concept_in_five']:.2f}/{cell['frechet_icons']:.1f}"


def run(args: argparse.Namespace) -> None:
    """Run the jobs of a plan on the images of a file."""
    import torch

    from bench.eight_styles import result_files
    from bench.eight_styles.images import read_judge
    from bench.eight_styles.judging import train_classifier
    from bench.eight_styles.worker import CLASSIFIER, encode, serve
    from bench.no_search import images
    from bench.pool import Place, gpus, run_all

    deadline = time.monotonic() + args.seconds
    styles = images.read(args.data)
    jobs = selected(PLANS[args.plan](args.styles or list(styles), args.seeds), args.lines)
    if args.without:
        jobs = result_files.missing(jobs, args.without)
    facts = {
        "data": images.digest(styles),
        "processes": args.processes,
        "plan": args.plan,
        "date": time.strftime("%Y-%m-%d"),
    }
    results = Run(facts, args.out or ROOT / "bench" / "results" / f"eight_styles_{args.plan}.json", len(jobs))
    classifier = args.data.with_suffix(CLASSIFIER)
    encoding = multiprocessing.get_context("spawn").Process(target=encode, args=(args.host, args.data))
    encoding.start()  # once, before all processes read it
    if not classifier.is_file():
        found = train_classifier(read_judge(args.data), classifier, args.judge_steps)
        print(f"the classifier finds {found:.3f} of the concepts of real images among five", flush=True)
    encoding.join()
    threads = max(1, (os.cpu_count() or 1) // args.processes)
    places = [Place(args.host, args.data, gpu, threads) for gpu in gpus(args.processes, torch.cuda.device_count())]
    left = run_all(jobs, places, serve, results.started, results.add, deadline)
    results.write()
    if left:
        print(f"{left} jobs were not started: the time limit was reached, or every process had died.", flush=True)


def selected(jobs: Sequence[Job], patterns: Sequence[str] | None) -> list[Job]:
    """Return the jobs whose name matches a pattern, in the order of the patterns, or all."""
    if patterns is None:
        return list(jobs)
    found: dict[int, Job] = {}
    for pattern in patterns:
        found |= {number: job for number, job in enumerate(jobs) if fnmatchcase(job.name, pattern)}
    return list(found.values())


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.eight_styles", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--host", type=Path, default=Path(".runtime/ComfyUI"))
    parser.add_argument("--data", type=Path, default=Path(".runtime/eight_styles.zip"), help="the images")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plan", choices=PLANS, default="table")
    parser.add_argument("--processes", type=int, default=1, help="number of processes that train in parallel")
    parser.add_argument("--seconds", type=float, default=math.inf, help="time limit after which no job starts")
    parser.add_argument("--styles", nargs="+", help="by default all of the file")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(plan.SEEDS))
    parser.add_argument("--lines", nargs="+", metavar="NAME", help='such as "rank *"; by default all')
    parser.add_argument("--without", type=Path, nargs="+", metavar="FILE", help="results whose jobs are not run again")
    parser.add_argument("--judge-steps", type=int, default=1500, help="of the classifier")
    parser.add_argument("--prepare", type=Path, metavar="FILE", help="only write the images into FILE")
    parser.add_argument("--icons", type=Path, default=Path(".runtime/icons"), help="folder for the icon packages")
    _add_report_options(parser)
    return parser.parse_args()


def _add_report_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("evaluating result files; where several have the same row, the last one counts")
    group.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="print the tables")
    group.add_argument("--stop", type=Path, nargs="+", metavar="FILE", help="print what rules for the stop miss")
    for name, what in (
        ("figure", 'what --lines draw, such as "rank 16, 640 steps", in --styles'),
        ("chart", "score, style and concept in five over the steps of --lines"),
        ("without-images", "the joined results without the drawn images"),
    ):
        group.add_argument(f"--{name}", type=Path, nargs="+", metavar=("OUT", "FILE"), help=f"write into OUT: {what}")
    group.add_argument(
        "--reference",
        nargs=2,
        metavar=("LINE", "STEP"),
        help='has the score 1; by default "rank 16" 640, or "plain" 640',
    )
    group.add_argument(
        "--default", nargs=2, metavar=("LINE", "STEP"), help='against the grid; by default "the default" returned'
    )


def main() -> None:
    args = parse_options()
    if args.prepare:
        from bench.eight_styles import images

        images.prepare(args.icons, args.prepare)
    elif any((args.table, args.stop, args.figure, args.chart, args.without_images)):
        from bench.eight_styles.reports import report

        try:
            report(args)
        except ValueError as error:
            sys.exit(str(error))
    else:
        run(args)


if __name__ == "__main__":
    main()
