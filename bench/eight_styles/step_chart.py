"""A chart of score, style and concept in five over the steps of some lines, means over styles and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.eight_styles.scores import Cell, Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = {"score": "Score", "style": "Style", "concept_in_five": "Concept in five"}
# Seven colours that differ for every kind of colour vision (Okabe and Ito 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#202020")
MARKERS = "osD^vPX"
_INK, _GRID = "#202020", "#dddddd"


def curves(scores: Scores, names: Sequence[str] | None = None) -> dict[str, list[tuple[int, Cell]]]:
    """Return the steps and cells of lines that were drawn at two steps or more.

    Args:
        scores: of the rows.
        names: of the lines; by default the first seven.

    Raises:
        ValueError: a line has fewer steps, or there are more lines than colours.
    """
    found: dict[str, list[tuple[int, Cell]]] = {}
    for cell in scores.cells:
        if cell.step.isdigit():
            found.setdefault(cell.name, []).append((int(cell.step), cell))
    found = {name: sorted(points) for name, points in found.items() if len(points) > 1}
    if names is None:
        return dict(list(found.items())[: len(COLOURS)])
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{missing[0]!r} was not drawn at two steps or more. Lines: {'; '.join(found) or 'none'}.")
    if len(names) > len(COLOURS):
        raise ValueError(f"A chart shows at most {len(COLOURS)} lines, but {len(names)} were named. Name fewer.")
    return {name: found[name] for name in names}


def write_chart(scores: Scores, path: Path, names: Sequence[str] | None = None) -> None:
    """Draw the chart and write it as its suffix says: PNG or SVG.

    Raises:
        ValueError: see `curves`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = _figure(scores, curves(scores, names))
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path)


def _figure(scores: Scores, lines: dict[str, list[tuple[int, Cell]]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(PANELS))
    for axes, (measure, title) in zip(panels, PANELS.items(), strict=True):
        _draw_panel(axes, title, {name: _points(scores, measure, points) for name, points in lines.items()})
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=9)
    return figure


def _points(scores: Scores, measure: str, points: Sequence[tuple[int, Cell]]) -> list[tuple[int, float]]:
    if measure == "score":
        return [(step, scores.score(cell)) for step, cell in points]
    return [(step, scores.mean(cell)[measure]) for step, cell in points]


def _draw_panel(axes: Axes, title: str, lines: dict[str, list[tuple[int, float]]]) -> None:
    for (name, points), colour, marker in zip(lines.items(), COLOURS, MARKERS, strict=False):
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color=colour, marker=marker, markersize=4, linewidth=1.5, label=name)
    axes.set_title(title, fontsize=11, color=_INK, loc="left")
    axes.set_xscale("log", base=2)
    ticks = _ticks(sorted({step for points in lines.values() for step, _ in points}))
    axes.set_xticks(ticks, [f"{step:,}" for step in ticks])
    axes.set_xlabel("steps", fontsize=9, color=_INK)
    axes.tick_params(labelsize=9, labelcolor=_INK, color=_GRID)
    axes.tick_params(which="minor", length=0)
    axes.grid(color=_GRID, linewidth=0.6)
    for spine in axes.spines.values():
        spine.set_color(_GRID)


def _ticks(steps: Sequence[int]) -> list[int]:
    """Return steps that are far enough apart for their labels: each at least 1.4 times the one before."""
    found = [steps[0]]
    for step in steps[1:]:
        if step >= 1.4 * found[-1]:
            found.append(step)
    return found
