"""The scores of what was drawn: measures as ratios to those of a reference, by style.

A cell is what one line of the study drew at one step, in all styles and seeds.
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from aclora_core.evaluation import Quality, score
from bench.no_search.verdict import Pair, spread_over_seeds
from bench.pool import Row

NETWORKS = ("icons", "photos")
SCORED = ("style", "concept_in_five", *(f"{key}_{name}" for name in NETWORKS for key in ("likeness", "frechet")))
SIZES = ("mean_rank", "bytes")
RETURNED = "returned"  # the step of the adapter that a training returns
LEAST_STYLE = 0.01  # of the reference; a style that it hardly draws would outweigh all others
_GRID = re.compile(r"rank \d+")

Measures = Mapping[str, float]


class Cell(NamedTuple):
    """What drew the images: a line of the study, and a step or a treatment of what it returned."""

    name: str
    step: str = ""  # "640", "returned", "strength 0.8", "energy 0.9"; empty where nothing was trained

    def __str__(self) -> str:
        if self.step in ("", RETURNED):
            return self.name
        return f"{self.name}, {self.step} steps" if self.step.isdigit() else f"{self.name}, {self.step}"


REFERENCES = (Cell("rank 16", "640"), Cell("plain", "640"), Cell("plain, cut", "640"))


class Scores:
    """The measures and scores of the cells. The styles are those that the reference was measured in.

    Args:
        rows: of a result file.
        reference: the cell that has the score 1; by default the first of REFERENCES that was measured.

    Raises:
        ValueError: the reference was not measured.
    """

    def __init__(self, rows: Iterable[Row], reference: Cell | None = None) -> None:
        rows = list(rows)
        self.errors = [row for row in rows if "error" in row]
        self.rows = [row for row in rows if "error" not in row]
        self.kinds: dict[str, str] = {row["name"]: row["kind"] for row in self.rows}
        self._measured = _by_cell(self.rows)
        self._means = {cell: _mean_over_seeds(found) for cell, found in self._measured.items()}
        self.reference = self._chosen(reference)
        self.styles = sorted(self._means[self.reference])
        self.cells = [cell for cell, found in self._means.items() if set(self.styles) <= set(found)]

    def _chosen(self, reference: Cell | None) -> Cell:
        wanted = REFERENCES if reference is None else (reference,)
        for cell in wanted:
            if cell in self._means:
                return cell
        raise ValueError(
            f"The reference was not measured: {' or '.join(map(str, wanted))}. Choose one by --reference LINE STEP; "
            f"the lines are: {'; '.join(self.kinds) or 'none'}."
        )

    def incomplete(self) -> dict[Cell, int]:
        """Return the cells that lack some of the styles, with the number of styles they have."""
        found = {cell: len(set(self.styles) & set(styles)) for cell, styles in self._means.items()}
        return {cell: count for cell, count in found.items() if count < len(self.styles)}

    def grid(self) -> list[Cell]:
        """Return the cells of the grid: plain LoRAs of a fixed rank after a number of steps."""
        return [cell for cell in self.cells if self.in_grid(cell.name) and cell.step.isdigit()]

    def in_grid(self, name: str) -> bool:
        """Return whether a line belongs to the grid of plain LoRAs."""
        return self.kinds[name] == "training" and _GRID.fullmatch(name) is not None

    def of_style(self, cell: Cell, style: str) -> Measures:
        """Return the measures of a cell in a style, means over the seeds."""
        return self._means[cell][style]

    def mean(self, cell: Cell) -> Measures:
        """Return the measures of a cell, means over the styles."""
        return _mean([self._means[cell][style] for style in self.styles])

    def rate(self, style: str, measures: Measures) -> float:
        """Return the score of measures in a style: the mean ratio to the reference's, by both networks."""
        reference = self.of_style(self.reference, style)
        reference = {**reference, "style": max(reference["style"], LEAST_STYLE)}
        return statistics.fmean(score(_quality(measures, name), _quality(reference, name)) for name in NETWORKS)

    def style_score(self, cell: Cell, style: str) -> float:
        """Return the score of a cell in a style; its measures are averaged over the seeds first."""
        return self.rate(style, self.of_style(cell, style))

    def score(self, cell: Cell) -> float:
        """Return the score of a cell, the mean over the styles."""
        return statistics.fmean(self.style_score(cell, style) for style in self.styles)

    def spread_over_seeds(self, cell: Cell) -> float:
        """Return the standard deviation of the score over the seeds; NaN if fewer than two have all styles."""
        found = self._measured[cell].items()
        return spread_over_seeds({pair: self.rate(pair[0], own) for pair, own in found if pair[0] in self.styles})

    def runs(self, cell: Cell) -> int:
        """Return in how many styles and seeds a cell was measured."""
        return sum(style in self.styles for style, _ in self._measured[cell])


def is_finite(cell: Mapping[str, object]) -> bool:
    """Return whether all measures that the score needs are numbers; a file has None for what is not finite."""
    return all(isinstance(cell.get(name), int | float) for name in SCORED)


def _quality(measures: Measures, network: str) -> Quality:
    distance = measures[f"frechet_{network}"]
    return Quality(measures["style"], measures["concept_in_five"], measures[f"likeness_{network}"], distance)


def _by_cell(rows: Iterable[Row]) -> dict[Cell, dict[Pair, Measures]]:
    """Return the measures of each cell by style and seed; cells with a value that is not finite are left out."""
    found: dict[Cell, dict[Pair, Measures]] = defaultdict(dict)
    for row in rows:
        for step, cell in row["cells"].items():
            if is_finite(cell):
                numbers = {name: value for name, value in cell.items() if isinstance(value, int | float)}
                found[Cell(row["name"], step)][row["style"], row["seed"]] = {**_sizes(row, step), **numbers}
    return dict(found)


def _sizes(row: Row, step: str) -> dict[str, float]:
    """Return rank and file size. The row has them for the adapter that was returned, which may have been truncated."""
    if RETURNED in row["cells"] and step.isdigit():
        return {}
    return {name: row[name] for name in SIZES if name in row}


def _mean_over_seeds(found: Mapping[Pair, Measures]) -> dict[str, Measures]:
    by_style: dict[str, list[Measures]] = defaultdict(list)
    for (style, _), measures in found.items():
        by_style[style].append(measures)
    return {style: _mean(seeds) for style, seeds in by_style.items()}


def _mean(found: Sequence[Measures]) -> dict[str, float]:
    """Return the mean of each measure that all have."""
    shared = set.intersection(*(set(measures) for measures in found))
    return {name: statistics.fmean(measures[name] for measures in found) for name in found[0] if name in shared}
