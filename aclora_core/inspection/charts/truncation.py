"""What a LoRA loses on held-out pictures when it is cut: the chart, and the same as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

from ...adapter import TruncationKind, TruncationLoss
from ...text import size_text
from ..tables import NO_CUTS
from .canvas import HEADING, LETTER, Canvas, new_paper, notice, text_width
from .training import SIZE

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_TITLE = "Held-out loss of each cut"


_LEFT, _RIGHT = 48.0, 20.0  # margins in points


_MOST = 1e12  # a damaged report's numbers would break the axes


_NO_LOSSES = "None of the cuts has a held-out loss: all are NaN or infinite. Train again with a lower learning rate."


def cut_chart(cuts: Sequence[TruncationLoss], size: tuple[int, int] = SIZE, dark: bool = False) -> Image.Image:
    """Held-out loss against mean rank (doubling from mark to mark) and size; lower is better, left is smaller.

    A bar is one standard error of the difference to the best; where it reaches the dashed line, the cut is as good as
    the best within the noise. A ring marks the cut that the training gave. Cuts without a finite loss are not drawn.

    Raises:
        ValueError: there is no cut.
    """
    if not cuts:
        raise ValueError(f"There is nothing to draw. {NO_CUTS}")
    drawn = sorted((cut for cut in cuts if _can_be_drawn(cut)), key=lambda cut: (cut.mean_rank, cut.size))
    if not drawn:
        return notice(_NO_LOSSES, size, dark)
    paper = new_paper(size, dark)
    axes, band = paper.axes(_LEFT, 32, _RIGHT, 40), paper.axes(_LEFT, paper.height - 40, _RIGHT, 22)
    limits = _draw_ranks(axes, [cut.mean_rank for cut in drawn])
    _draw_sizes(paper, band, drawn, limits)
    _draw_losses(paper, axes, drawn)
    left_out = len(cuts) - len(drawn)
    title = _TITLE + (f" ({left_out} not drawn)" if left_out else "")
    paper.heading(band, title)
    chosen = next((cut for cut in drawn if cut.chosen), None)
    if chosen is not None:
        _name_chosen(paper, band, chosen, title)
    return paper.draw()


def _can_be_drawn(cut: TruncationLoss) -> bool:
    return abs(cut.loss) < _MOST and 0.0 < cut.mean_rank < _MOST  # both are false for NaN


def _error(cut: TruncationLoss) -> float:
    """Half the height of the bar; 0 where it is unknown."""
    return cut.error if 0.0 < cut.error < _MOST else 0.0


def _draw_ranks(axes: Axes, ranks: Sequence[float]) -> tuple[float, float]:
    """The axis of the ranks, with a mark at each power of two; at least two of them can be seen."""
    low, high = min(ranks) / 1.3, max(ranks) * 1.3
    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
    if first >= last:
        first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
    low, high = min(low, 2.0**first / 1.1), max(high, 2.0**last * 1.1)
    powers = [2.0**power for power in range(first, last + 1)]
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    axes.set_xticks(powers, [f"{power:g}" for power in powers])
    axes.tick_params(which="minor", length=0)
    axes.set_xlabel("mean rank of the layers", labelpad=1)
    return low, high


def _draw_sizes(paper: Canvas, band: Axes, cuts: Sequence[TruncationLoss], limits: tuple[float, float]) -> None:
    """The size of each cut above its place, of the chosen one first, of others as far as there is room."""
    band.set_axis_off()
    band.set_xscale("log", base=2)
    band.set_xlim(*limits)
    band.set_ylim(0.0, 1.0)
    width = paper.width - _LEFT - _RIGHT
    octaves = math.log2(limits[1] / limits[0])
    taken: list[tuple[float, float]] = []
    for cut in sorted(cuts, key=lambda cut: not cut.chosen):
        text = size_text(cut.size)
        half = text_width(text) / 2
        # A label at the edge moves inwards, so that it stays on the paper.
        middle = math.log2(cut.mean_rank / limits[0]) / octaves * width
        middle = min(max(middle, half - _LEFT + 6), width + _RIGHT - 6 - half)
        if any(abs(middle - other) < half + other_half + 6 for other, other_half in taken):
            continue
        taken.append((middle, half))
        colour = paper.theme.mark if cut.chosen else paper.theme.ink
        band.text(
            middle / width,
            0.15,
            text,
            transform=band.transAxes,
            fontsize=LETTER,
            color=colour,
            ha="center",
            va="bottom",
        )
        band.plot([cut.mean_rank] * 2, [0.0, 0.15], color=colour, linewidth=1.0, clip_on=False)


def _draw_losses(paper: Canvas, axes: Axes, cuts: Sequence[TruncationLoss]) -> None:
    """A line for each way of cutting: the ranks, the energies, and what is neither."""
    theme = paper.theme
    looks: dict[TruncationKind, tuple[str, str, str]] = {
        "fixed": ("fixed rank", theme.first, "-o"),
        "energy": ("share of energy", theme.second, "-s"),
        "whole": ("whole", theme.third, "D"),
        "signal": ("signal", theme.ink, "^"),
        "other": ("other", theme.faint, "v"),
    }
    for kind, (label, colour, style) in looks.items():
        found = [cut for cut in cuts if cut.truncation.kind == kind]
        if not found:
            continue
        ranks, losses = [cut.mean_rank for cut in found], [cut.loss for cut in found]
        axes.plot(ranks, losses, style, color=colour, markersize=4.5, linewidth=1.4, label=label)
        bars = [_error(cut) or math.nan for cut in found]
        axes.errorbar(ranks, losses, bars, fmt="none", ecolor=colour, elinewidth=1.0, capsize=2.5, alpha=0.7)
    best = min(cut.loss for cut in cuts)
    axes.axhline(best, color=theme.faint, linewidth=0.9, linestyle=(0, (4, 3)), label="the best", zorder=1)
    for cut in cuts:
        if cut.chosen:
            axes.plot(
                cut.mean_rank,
                cut.loss,
                "o",
                markersize=11,
                color=theme.mark,
                fillstyle="none",
                markeredgewidth=1.8,
            )
    axes.grid(color=theme.grid, linewidth=0.6)
    _set_loss_range(axes, cuts)
    paper.legend(axes, above=False)


def _set_loss_range(axes: Axes, cuts: Sequence[TruncationLoss]) -> None:
    low, high = min(cut.loss - _error(cut) for cut in cuts), max(cut.loss + _error(cut) for cut in cuts)
    pad = 0.1 * (high - low)
    if pad < 1e-6 * max(abs(low), abs(high), 1e-12):  # all the same: a range of its own, with the line in the middle
        pad = 0.05 * abs(high) or 0.05
    axes.set_ylim(low - pad, high + pad)
    axes.locator_params(axis="y", nbins=5)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")


def _name_chosen(paper: Canvas, band: Axes, chosen: TruncationLoss, title: str) -> None:
    """The chosen cut and its size on the right of the heading, as much of it as there is room for."""
    room = paper.width - 30 - text_width(title, HEADING)
    size = size_text(chosen.size)
    for text in (f"ring: given, {chosen.name}, {size}", f"ring: given, {size}", f"given: {size}", size):
        if text_width(text, HEADING) <= room:
            paper.heading(band, text, paper.theme.mark, "right")
            return
