"""Train the quickstart's style in several ways, draw 96 things that were not learned, and judge them.

    python -m bench.eight_styles --prepare .runtime/eight_styles.zip    # once, for the judge's images; needs npm
    python -m bench.quickstart_trials [--trials "24 images, *"] [--seeds 7 8]
    python -m bench.quickstart_trials --table FILE

The judge is the classifier of bench/eight_styles; where that has not trained it yet, it is trained first: seconds on a
GPU, hours on a CPU. There --judge-steps 400 --judge-coarse 1600 --judge-batch 128 trains a weaker one in less time; its
numbers do not compare with those of eight_styles. Writes the rows into bench/results/quickstart_trials.json after every
training, and a sheet of each into --sheets.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.quickstart_trials.trials import TRIALS, Trial, shown_concepts, verdict_concepts
from bench.result_file import write
from launcher.environment import ROOT

RESULTS = ROOT / "bench" / "results" / "quickstart_trials.json"
_COLUMNS, _CELL = 12, 64  # of a sheet


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.quickstart_trials", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--host", type=Path, default=Path(".runtime/ComfyUI"))
    parser.add_argument("--data", type=Path, default=Path(".runtime/eight_styles.zip"), help="the judge's images")
    parser.add_argument("--icons", type=Path, default=Path(".runtime/icons"), help="folder of the icon packages")
    parser.add_argument("--trials", nargs="+", metavar="NAME", help='such as "24 images, *"; by default all')
    parser.add_argument("--seeds", nargs="+", type=int, default=[7], help="the workflow has 7")
    parser.add_argument("--judge-steps", type=int, default=1500, help="of the classifier")
    parser.add_argument("--judge-coarse", type=int, default=0, help="more steps before these, on small images")
    parser.add_argument("--judge-batch", type=int, default=512, help="images of a step of the classifier")
    parser.add_argument(
        "--sheets", type=Path, default=Path(".runtime/quickstart_trials"), help="folder for the drawings"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print the table of a result file")
    return parser.parse_args()


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the trials and return a row for each way of drawing."""
    from bench.quickstart_trials.judging import IconJudge
    from bench.quickstart_trials.studio import open_tiny_base, opened

    judge = IconJudge(args.data, args.judge_steps, args.judge_coarse, args.judge_batch)
    host, rows = open_tiny_base(args.host), []
    concepts = verdict_concepts(args.icons)
    for trial in chosen(args.trials):
        with opened(host, args.icons, trial, trial.captions([*concepts, *shown_concepts()])) as studio:
            for seed in args.seeds:
                began = time.monotonic()
                result = studio.train(trial, seed)
                seconds = round(time.monotonic() - began, 1)
                for drawing in trial.drawings:
                    images = studio.draw(result.adapter, drawing)
                    name = ", ".join(filter(None, [trial.name, str(drawing)]))
                    facts = {"trial": name, "seed": seed, "steps": result.report.facts.steps_run, "seconds": seconds}
                    rows.append({**facts, **judge.measures(images[: len(concepts)], concepts)})
                    print(row_of(rows[-1]), flush=True)
                    save_sheet(images.numpy(), args.sheets / f"{name}, seed {seed}.webp")
                    write(args.out, {"concepts": concepts, "rows": rows})
    return rows


def chosen(patterns: Iterable[str] | None) -> list[Trial]:
    """Return the trials whose name matches a pattern, or all."""
    return [trial for trial in TRIALS if any(fnmatchcase(trial.name, pattern) for pattern in patterns or ["*"])]


def row_of(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    shares = " | ".join(f"{row[key]:.2f}" for key in ("style", "concept_in_five", "concept"))
    return f"| {row['trial']} | {row['seed']} | {shares} | {row['steps']} | {row['seconds']:.0f} |"


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Return the table of result rows, in Markdown."""
    head = "| trial | seed | style | concept in five | concept | steps | seconds of training |\n" + "| --- " * 7 + "|"
    return "\n".join([head, *map(row_of, rows)])


def save_sheet(images: np.ndarray, path: Path) -> None:
    """Save drawings (n, h, w, 3) in 0..1 as one image, row by row."""
    cells = [Image.fromarray((image * 255).round().astype(np.uint8)).resize((_CELL, _CELL)) for image in images]
    sheet = Image.new("RGB", (_COLUMNS * _CELL, -(-len(cells) // _COLUMNS) * _CELL), "white")
    for number, cell in enumerate(cells):
        sheet.paste(cell, (number % _COLUMNS * _CELL, number // _COLUMNS * _CELL))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=85)


def main() -> None:
    args = parse_options()
    if args.table:
        import json

        print(table(json.loads(args.table.read_text(encoding="utf-8"))["rows"]))
    else:
        print(table(run(args)))


if __name__ == "__main__":
    main()
