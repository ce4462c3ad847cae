"""The measurements as a Markdown table and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.step_time.clock import Measured

_COLUMNS = (
    "variant",
    "ms a step",
    "times faster than native's best",
    "to the bare loop",
    "memory, GB",
    "share of the peak",
    "to the first step, s",
    "warm-up, s",
    "to the tenth step, s",
)
_MAX_FAILURE = 80  # characters of a failure in the table; the log lines and the JSON have all of it


class Table:
    """The measurements; each is printed and written at once, so an interrupted run keeps what it has."""

    def __init__(self, facts: dict[str, Any], file: Path | None) -> None:
        self.facts, self.file = facts, file
        self.cases: dict[str, dict[str, Any]] = {}  # facts of a whole case
        self.rows: list[Measured] = []

    def add_case(self, name: str, **facts: Any) -> None:
        """Add the facts of a case, before its first row."""
        self.cases[name] = facts
        self.write()

    def add(self, row: Measured) -> None:
        self.rows.append(row)
        time = row.failure or f"{row.median:.1f} ms over {len(row.milliseconds)} steps"
        memory = "" if row.memory_gb is None else f", {row.memory_gb:.1f} GB"
        print(f"  {row.case}, batch {row.batch}, {row.variant}: {time}{memory}", flush=True)
        for message in dict.fromkeys(row.said):
            print(f"    {message}", flush=True)
        self.write()

    def write(self) -> None:
        if self.file is None:
            return
        rows = [{**asdict(row), "median_ms": None if math.isnan(row.median) else row.median} for row in self.rows]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps({**self.facts, "cases": self.cases, "rows": rows}, indent=2) + "\n")

    def print(self) -> None:
        """Print a table for each case and batch size, with ratios to the native node's best mode."""
        for case, batch in dict.fromkeys((row.case, row.batch) for row in self.rows):
            facts, rows = self.cases[case], [r for r in self.rows if (r.case, r.batch) == (case, batch)]
            work, peak = (facts["flops"] or math.nan) * batch, self.facts["peak_flops"]
            print(f"\n### {facts['title']}, batch {batch}\n")
            if not math.isnan(work):
                print(f"{work / 1e12:.3g} TFLOP a step; {1000 * work / peak:.3g} ms at the measured peak.\n")
            print("| " + " | ".join(_COLUMNS) + " |\n|" + " --- |" * len(_COLUMNS))
            best = min((r.median for r in rows if r.kind == "native" and not math.isnan(r.median)), default=math.nan)
            bare = next((r.median for r in rows if r.kind == "bare"), math.nan)
            for row in rows:
                cells = (
                    [row.variant, row.failure[:_MAX_FAILURE]] if row.failure else _cells(row, best, bare, work / peak)
                )
                print("| " + " | ".join([*cells, *[""] * (len(_COLUMNS) - len(cells))]) + " |")


def _cells(row: Measured, best: float, bare: float, least: float) -> list[str]:
    """Return a row's cells. least: seconds that the step's FLOPs take at the measured peak."""
    seconds = [row.seconds.get(name) for name in ("first", "warm-up", "tenth")]
    return [
        row.variant,
        f"{row.median:.1f}",
        "" if math.isnan(best) else f"{best / row.median:.2f}",
        "" if math.isnan(bare) else f"{row.median / bare:.2f}",
        "" if row.memory_gb is None else f"{row.memory_gb:.1f}",
        "" if math.isnan(least) else f"{1000 * least / row.median:.1%}",
        *("" if value is None else f"{value:.2f}" for value in seconds),
    ]
