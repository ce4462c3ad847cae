"""Compare the training step times of two checkouts of the pack, each in processes of its own, in turns."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from launcher.environment import ROOT

_LONGEST_RUN = 300  # seconds; a process that takes longer is ended and counts as failed


@dataclass
class Version:
    """The measurements of one checkout for one case and batch size."""

    checkout: Path
    rounds: list[list[float]] = field(default_factory=list)  # milliseconds of the timed steps, a list for each process
    last_losses: list[float] = field(default_factory=list)  # of each process; the seed is the same for all
    log: list[str] = field(default_factory=list)  # what the pack logged, each message once
    failures: list[str] = field(default_factory=list)

    @property
    def medians(self) -> list[float]:
        """The median step time of each process, in milliseconds."""
        return [statistics.median(steps) for steps in self.rounds]

    @property
    def median(self) -> float | None:
        """The median of these, or None without a measurement."""
        return statistics.median(self.medians) if self.rounds else None


@dataclass
class Comparison:
    """Both checkouts for one case and batch size."""

    case: str
    batch: int
    old: Version
    new: Version

    @property
    def ratio(self) -> float | None:
        """New over old; below 1 the new version is faster. None if either failed in every round."""
        if self.old.median is None or self.new.median is None:
            return None
        return self.new.median / self.old.median

    def as_json(self) -> dict[str, Any]:
        """Return the measurements as JSON values."""
        versions = {
            name: {
                "median_ms": version.median,
                "rounds_ms": version.rounds,
                "last_losses": version.last_losses,
                "log": version.log,
                "failures": version.failures,
            }
            for name, version in (("old", self.old), ("new", self.new))
        }
        return {"case": self.case, "batch": self.batch, "ratio": self.ratio, **versions}


def compare_versions(args: argparse.Namespace) -> list[Comparison]:
    """Time both checkouts in turns, print a table and write the JSON file if one is named.

    A round runs every case once with each checkout, and the order of the two changes from round to round. After
    args.seconds no new round begins.
    """
    began = time.monotonic()
    comparisons = [
        Comparison(case, batch, old=Version(args.against), new=Version(ROOT))
        for case in args.cases
        for batch in args.batches
    ]
    for number in range(args.rounds):
        if number and time.monotonic() - began > args.seconds:
            print(f"{args.seconds:.0f} seconds are over after {number} of {args.rounds} rounds.", flush=True)
            break
        for comparison in comparisons:
            _run_round(comparison, number, args)
        _write(args.out, comparisons)
    print_table(comparisons)
    return comparisons


def _run_round(comparison: Comparison, number: int, args: argparse.Namespace) -> None:
    versions = [("old", comparison.old), ("new", comparison.new)]
    for name, version in versions if number % 2 == 0 else versions[::-1]:
        found = _run_process(version.checkout, comparison.case, comparison.batch, args)
        version.log += [message for message in found.get("log", []) if message not in version.log]
        if found["failure"]:
            version.failures.append(found["failure"])
            outcome = found["failure"]
        else:
            version.rounds.append(found["milliseconds"])
            version.last_losses.append(found["last_loss"])
            outcome = f"{version.medians[-1]:.2f} ms"
        print(f"  round {number + 1}, {comparison.case}, batch {comparison.batch}, {name}: {outcome}", flush=True)


def _run_process(checkout: Path, case: str, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Time one checkout in a process of its own; a failure is a result too."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "bench.step_time.one_version", "--checkout", str(checkout.resolve())]
        command += ["--host", str(args.host.resolve()), "--case", case, "--batch", str(batch), "--out", str(out)]
        command += ["--warm-up", str(args.warm_up), "--steps", str(args.steps), *(["--tiny"] if args.tiny else [])]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=_LONGEST_RUN)
        except subprocess.TimeoutExpired:
            return {"failure": f"took more than {_LONGEST_RUN} seconds"}
        if done.returncode or not out.is_file():
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            return {"failure": lines[-1]}
        return dict(json.loads(out.read_text(encoding="utf-8")))


def _write(path: Path | None, comparisons: Sequence[Comparison]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [comparison.as_json() for comparison in comparisons]
    path.write_text(json.dumps({"comparisons": rows}, indent=1) + "\n", encoding="utf-8")


def print_table(comparisons: Sequence[Comparison]) -> None:
    """Print a row for each case and batch size."""
    print("\n| case | batch | old, ms a step | new, ms a step | new / old |\n| --- | --- | --- | --- | --- |")
    for comparison in comparisons:
        ratio = "" if comparison.ratio is None else f"{comparison.ratio:.3f}"
        cells = [comparison.case, str(comparison.batch), _cell(comparison.old), _cell(comparison.new), ratio]
        print("| " + " | ".join(cells) + " |")


def _cell(version: Version) -> str:
    if version.median is None:
        return "failed"
    return f"{version.median:.2f} ({min(version.medians):.2f} to {max(version.medians):.2f})"
