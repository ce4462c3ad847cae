"""The verdict: a candidate, such as the default, against the grid of plain LoRAs chosen with hindsight."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from bench.eight_styles.scores import RETURNED, Cell, Scores

DEFAULT = Cell("the default", RETURNED)


@dataclass(frozen=True)
class Verdict:
    """What the grid reaches, and what a candidate reaches in its place.

    Attributes:
        best: the cell of the grid with the highest score.
        median: the cell in the middle of the grid by score; of an even number the better one of the middle two.
        best_of_style: the grid's best cell of each style.
        best_library: the best cell of the libraries; None if there is none.
    """

    scores: Scores
    candidate: Cell | None
    best: Cell
    median: Cell
    best_of_style: Mapping[str, Cell]
    best_library: Cell | None

    @property
    def score_of_best(self) -> float:
        """The mean score of the best cell of each style."""
        return statistics.fmean(self.scores.style_score(cell, style) for style, cell in self.best_of_style.items())

    def ratio(self, cell: Cell, other: Cell) -> float:
        """Return the score of a cell as a share of another one's."""
        return self.scores.score(cell) / self.scores.score(other)

    def regrets(self, cell: Cell) -> dict[str, float]:
        """Return what a cell misses of each style's own best: 1 - score / best score; below 0 if better."""
        found = {}
        for style, best in self.best_of_style.items():
            found[style] = 1 - self.scores.style_score(cell, style) / self.scores.style_score(best, style)
        return found


def verdict(scores: Scores, candidate: Cell = DEFAULT) -> Verdict | None:
    """Compare a candidate with the grid; None if no cell of a grid was measured in all styles."""
    order = sorted(scores.grid(), key=scores.score)
    if not order:
        return None
    libraries = [cell for cell in scores.cells if scores.kinds[cell.name] == "library"]
    return Verdict(
        scores=scores,
        candidate=candidate if candidate in scores.cells else None,
        best=order[-1],
        median=order[len(order) // 2],
        best_of_style={style: _best_of(scores, style) for style in scores.styles},
        best_library=max(libraries, key=scores.score, default=None),
    )


def _best_of(scores: Scores, style: str) -> Cell:
    return max(scores.grid(), key=lambda cell: scores.style_score(cell, style))
