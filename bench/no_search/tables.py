"""The results as Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bench.no_search.verdict import Line, Results

BEHIND_BEST, AHEAD_OF_MEDIAN = 0.02, 0.09  # the aims


def report(results: Results) -> str:
    """Return all tables as Markdown."""
    parts = [_errors(results)]
    if results.grid:
        parts += [_lines(results), _grid(results), _best(results), _aims(results)]
    else:
        parts.append("No style and seed has the whole grid, so there is nothing to compare with.")
    return "\n\n".join(part for part in parts if part)


def _lines(results: Results) -> str:
    header = [
        "",
        "runs",
        "loss",
        "spread over seeds",
        "to the grid's best",
        "to the median rank",
        "to its last step",
        "before truncation",
        "steps run",
        "mean rank",
        "file, MB",
        "to the best's file",
    ]
    return (
        f"Loss on the test images as a share of the base's, mean over {len(results.grid)} styles and seeds\n\n"
        + markdown(header, [_cells(line) for line in results.lines()])
    )


def _cells(line: Line) -> list[str]:
    changes = [f"{value - 1:+.1%}" for value in (line.to_best, line.to_median, line.to_median_last)]
    return [
        line.name,
        str(line.runs),
        f"{line.loss:.4f}",
        _number(line.spread, ".4f"),
        *changes,
        _number(line.before_truncation, ".4f"),
        f"{line.steps:.0f}",
        f"{line.rank:.1f}",
        f"{line.size / 1e6:.2f}",
        f"{line.size_to_best:.2f}",
    ]


def _grid(results: Results) -> str:
    rows = [
        [f"rank {rank}", *(f"{results.grid_mean(rank, mark):.3f}" for mark in results.marks)] for rank in results.ranks
    ]
    return "The grid: fixed rank after so many steps\n\n" + markdown(["", *map(str, results.marks)], rows)


def _best(results: Results) -> str:
    best = results.best()
    seeds = sorted({seed for _, seed in best})
    rows = []
    for style in sorted({style for style, _ in best}):
        row = [style]
        for seed in seeds:
            point = best.get((style, seed))
            row.append("" if point is None else f"{point.loss:.4f} (rank {point.rank:.0f}, step {point.steps})")
        rows.append(row)
    return "The grid's best with hindsight\n\n" + markdown(["style", *(f"seed {seed}" for seed in seeds)], rows)


def _aims(results: Results) -> str:
    """Compare the best setting with the aims."""
    settings = [line for line in results.lines() if line.name in results.settings]
    if not settings:
        return "No setting of AC-LoRA was run."
    line = min(settings, key=lambda line: line.to_best)
    behind, ahead = line.to_best - 1, 1 - line.to_median
    lines = [
        f'"{line.name}" is the best setting:',
        f"- {behind:+.1%} from the grid's best; aim: at most {BEHIND_BEST:+.0%}: {_met(behind <= BEHIND_BEST)}",
        f"- {ahead:.1%} ahead of the median rank at its best step, {1 - line.to_median_last:.1%} ahead of it after "
        f"the last; aim: {AHEAD_OF_MEDIAN:.0%}: {_met(ahead >= AHEAD_OF_MEDIAN)}",
        f"- its file is {line.size_to_best:.2f} times the one of the grid's best; aim: smaller: "
        f"{_met(line.size_to_best < 1)}",
    ]
    return "\n".join(lines)


def _errors(results: Results) -> str:
    lines = [f"- {row['name']}, {row['style']}, seed {row['seed']}: {row['error']}" for row in results.errors]
    return "\n".join(["Failed:", *lines]) if lines else ""


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)


def _met(yes: bool) -> str:
    return "met" if yes else "not met"
