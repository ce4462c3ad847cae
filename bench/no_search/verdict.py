"""Evaluate the results: every loss as a share of the base's, and the settings relative to the grid."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.pool import Row

Pair = tuple[str, int]  # style and seed


@dataclass(frozen=True)
class Point:
    """One adapter of one style and seed."""

    loss: float  # on the test images, as a share of the base's
    steps: int  # run in total
    rank: float  # mean over the layers
    size: int  # bytes of the file


@dataclass(frozen=True)
class Line:
    """The means of a setting, or of a choice from the grid, over styles and seeds."""

    name: str
    runs: int
    loss: float
    spread: float  # standard deviation over seeds of the mean over styles; NaN for one seed
    to_best: float  # mean ratio to the grid's best of the same style and seed
    to_median: float  # to the median rank's best step
    to_median_last: float  # to the median rank's last step
    steps: float
    rank: float
    size: float
    size_to_best: float  # mean ratio to the file of the grid's best
    before_truncation: float  # loss of the adapter before truncation; NaN if none was truncated


class Results:
    """The rows of one or several runs; of two rows with the same name, style and seed the later one counts.

    Styles and seeds with an incomplete grid are ignored.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        latest = {(row["name"], row["style"], row["seed"]): row for row in rows}
        self.errors = [row for row in latest.values() if "error" in row]
        good = [row for row in latest.values() if row.get("loss") is not None]
        self.base: dict[str, float] = {row["style"]: row["loss"] for row in good if row["kind"] == "base"}
        good = [row for row in good if row["style"] in self.base]
        grid = [row for row in latest.values() if row["kind"] == "grid" and "error" not in row]
        self.ranks = sorted({int(row["settings"]["max_rank"]) for row in grid})
        by_pair: dict[Pair, dict[int, Row]] = {}
        for row in [row for row in grid if row["style"] in self.base]:
            by_pair.setdefault(_pair(row), {})[int(row["settings"]["max_rank"])] = row
        self.grid = {pair: ranks for pair, ranks in sorted(by_pair.items()) if len(ranks) == len(self.ranks)}
        self.settings: dict[str, dict[Pair, Row]] = {}
        for row in good:
            if row["kind"] == "setting" and _pair(row) in self.grid:
                self.settings.setdefault(row["name"], {})[_pair(row)] = row
        shared = [set(row["losses"]) for ranks in self.grid.values() for row in ranks.values()]
        self.marks = sorted(map(int, set.intersection(*shared))) if shared else []

    def grid_point(self, pair: Pair, rank: int, mark: int) -> Point:
        """Return the point of a fixed rank after a number of steps."""
        row = self.grid[pair][rank]
        loss = row["losses"][str(mark)]
        share = math.inf if loss is None else loss / self.base[pair[0]]
        return Point(share, mark, row["mean_rank"], row["bytes"])

    def best_mark(self, pair: Pair, rank: int) -> Point:
        """Return the point of a fixed rank at its best step."""
        return min((self.grid_point(pair, rank, mark) for mark in self.marks), key=_loss)

    def best(self) -> dict[Pair, Point]:
        """Return the best rank and step of each style and seed, chosen on the test images."""
        return {pair: min((self.best_mark(pair, rank) for rank in self.ranks), key=_loss) for pair in self.grid}

    def best_for_all(self) -> tuple[int, int]:
        """Return the rank and step that are best on average, chosen on the test images."""
        means = {(rank, mark): self.grid_mean(rank, mark) for rank in self.ranks for mark in self.marks}
        return min(means, key=lambda choice: means[choice])

    def median_rank(self) -> dict[Pair, Point]:
        """Return the median of the fixed ranks, sorted by the loss at their best step."""
        return self._middle(self.best_mark)

    def median_rank_last(self) -> dict[Pair, Point]:
        """Return the median of the fixed ranks, sorted by the loss after the last step."""
        return self._middle(lambda pair, rank: self.grid_point(pair, rank, self.marks[-1]))

    def _middle(self, point: Callable[[Pair, int], Point]) -> dict[Pair, Point]:
        """Return the median point; with an even number of ranks the better of the middle two."""
        return {
            pair: sorted((point(pair, rank) for rank in self.ranks), key=_loss)[(len(self.ranks) - 1) // 2]
            for pair in self.grid
        }

    def grid_mean(self, rank: int, mark: int) -> float:
        """Return a cell of the grid: the mean loss over styles and seeds."""
        return statistics.fmean(self.grid_point(pair, rank, mark).loss for pair in self.grid)

    def lines(self) -> list[Line]:
        """Return the choices from the grid, then the settings, the best first."""
        if not self.grid:
            return []
        rank, mark = self.best_for_all()
        settings = [self._setting_line(name) for name in self.settings]
        return [
            self.line("grid: best rank and step of each", self.best()),
            self.line(f"grid: rank {rank}, step {mark}, best for all", self._everywhere(rank, mark)),
            self.line("grid: median rank, its best step", self.median_rank()),
            self.line(f"grid: median rank, step {self.marks[-1]}", self.median_rank_last()),
            *sorted(settings, key=lambda line: line.to_best),
        ]

    def _everywhere(self, rank: int, mark: int) -> dict[Pair, Point]:
        return {pair: self.grid_point(pair, rank, mark) for pair in self.grid}

    def _setting_line(self, name: str) -> Line:
        rows = self.settings[name]
        points = {
            pair: Point(row["loss"] / self.base[pair[0]], row["steps_run"], row["mean_rank"], row["bytes"])
            for pair, row in rows.items()
        }
        whole = [_before_truncation(row) / self.base[pair[0]] for pair, row in rows.items()]
        return self.line(name, points, statistics.fmean(whole))

    def line(self, name: str, points: Mapping[Pair, Point], before_truncation: float = math.nan) -> Line:
        """Return the means of the points, and of their ratios to the grid's point of the same style and seed."""

        def ratio(others: Mapping[Pair, Point], of: Callable[[Point], float]) -> float:
            return statistics.fmean(of(point) / of(others[pair]) for pair, point in points.items())

        best = self.best()
        return Line(
            name=name,
            runs=len(points),
            loss=statistics.fmean(point.loss for point in points.values()),
            spread=spread_over_seeds({pair: point.loss for pair, point in points.items()}),
            to_best=ratio(best, _loss),
            to_median=ratio(self.median_rank(), _loss),
            to_median_last=ratio(self.median_rank_last(), _loss),
            steps=statistics.fmean(point.steps for point in points.values()),
            rank=statistics.fmean(point.rank for point in points.values()),
            size=statistics.fmean(point.size for point in points.values()),
            size_to_best=ratio(best, lambda point: point.size),
            before_truncation=before_truncation,
        )


def spread_over_seeds(losses: Mapping[Pair, float]) -> float:
    """Return the standard deviation over seeds of the mean over styles; NaN with fewer than two complete seeds."""
    styles = {style for style, _ in losses}
    means = []
    for seed in sorted({seed for _, seed in losses}):
        if all((style, seed) in losses for style in styles):
            means.append(statistics.fmean(losses[style, seed] for style in styles))
    return statistics.stdev(means) if len(means) > 1 else math.nan


def join(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the results of several runs.

    Raises:
        ValueError: they have different images or options, so their numbers cannot be compared.
    """
    first = runs[0]
    for run in runs[1:]:
        for name in ("data", "common"):
            if run[name] != first[name]:
                raise ValueError(
                    f"The results differ in '{name}': {first[name]} and {run[name]}. Join only runs on the same images "
                    "with the same options."
                )
    return {**first, "rows": [row for run in runs for row in run["rows"]]}


def _before_truncation(row: Row) -> float:
    """Return the loss of the adapter before truncation; NaN if it was not truncated."""
    whole = row["whole"].get("refit", row["whole"].get("best step"))
    return math.nan if whole is None else float(whole)


def _pair(row: Row) -> Pair:
    return row["style"], row["seed"]


def _loss(point: Point) -> float:
    return point.loss
