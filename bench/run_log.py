"""The results of a benchmark while it runs: printed row by row, and written to a file."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from bench.pool import Row
from bench.result_file import write


class RunLog(ABC):
    """Prints each row and writes all of them, so an interrupted run keeps what it has.

    Args:
        facts: of the run, written beside the rows.
        path: of the file.
        planned: how many rows are expected.

    Attributes:
        pause: seconds between two writings, at least; 0 to write after every row.
    """

    pause = 0.0

    def __init__(self, facts: dict[str, Any], path: Path, planned: int) -> None:
        self.facts, self.path, self.planned = facts, path, planned
        self.rows: list[Row] = []
        self.began = self._written = time.monotonic()

    @abstractmethod
    def outcome(self, row: Row) -> str:
        """Return what a row says, in a few words."""

    def started(self, said: dict[str, Any]) -> None:
        """Take over the description of a process that is ready."""
        self.facts |= said
        print(f"{self._clock()} a process is ready on {said['device']}", flush=True)

    def add(self, row: Row) -> None:
        """Print a row and keep it."""
        self.rows.append(row)
        what = f"{row['style']}, seed {row['seed']}, {row['name']}, {row.get('seconds', math.nan):.1f} s"
        print(f"{self._clock()} {len(self.rows)}/{self.planned} {what}: {self.outcome(row)}", flush=True)
        if time.monotonic() - self._written >= self.pause:
            self.write()

    def write(self) -> None:
        """Write the rows that there are."""
        write(self.path, {**self.facts, "rows": self.rows})
        self._written = time.monotonic()

    def _clock(self) -> str:
        return f"{time.monotonic() - self.began:6.1f} s"
