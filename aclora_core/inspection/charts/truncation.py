"""Chart of the held-out loss of each truncation that a training tried."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

from ...adapter import TruncationKind, TruncationLoss
from ...text import size_text
from ..tables import NO_TRUNCATIONS
from .canvas import FONT_SIZE, HEADING_SIZE, SIZE, Canvas, new_canvas, notice, text_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_HEADING = "Validation loss of each truncation"


_LEFT, _RIGHT = 48.0, 20.0  # margins in points


_MAX_NUMBER = 1e12  # a damaged report's numbers would break the axes


_NO_LOSSES = "No truncation has a finite validation loss. Train again with a lower learning rate."


def truncation_chart(
    truncations: Sequence[TruncationLoss], size: tuple[int, int] = SIZE, dark: bool = False
) -> Image.Image:
    """Draw the held-out loss over mean rank (log scale) and size; lower is better, left is smaller.

    A bar is one standard error of the difference to the best: where it reaches the dashed line, the truncation is as
    good as the best within the noise. A ring marks the one that the training gave. Losses that are not finite are not
    drawn.

    Raises:
        ValueError: there is no truncation.
    """
    if not truncations:
        raise ValueError(f"There is nothing to draw. {NO_TRUNCATIONS}")
    drawn = sorted(
        (tried for tried in truncations if _can_be_drawn(tried)), key=lambda tried: (tried.mean_rank, tried.size)
    )
    if not drawn:
        return notice(_NO_LOSSES, size, dark)
    canvas = new_canvas(size, dark)
    axes, band = canvas.axes(_LEFT, 32, _RIGHT, 40), canvas.axes(_LEFT, canvas.height - 40, _RIGHT, 22)
    limits = _draw_ranks(axes, [tried.mean_rank for tried in drawn])
    _draw_sizes(canvas, band, drawn, limits)
    _draw_losses(canvas, axes, drawn)
    not_drawn = len(truncations) - len(drawn)
    title = _HEADING + (f" ({not_drawn} not drawn)" if not_drawn else "")
    canvas.heading(band, title)
    chosen = next((tried for tried in drawn if tried.chosen), None)
    if chosen is not None:
        _name_chosen(canvas, band, chosen, title)
    return canvas.draw()


def _can_be_drawn(tried: TruncationLoss) -> bool:
    return abs(tried.loss) < _MAX_NUMBER and 0.0 < tried.mean_rank < _MAX_NUMBER  # false for NaN


def _error(tried: TruncationLoss) -> float:
    """Half the height of the error bar; 0 if unknown."""
    return tried.error if 0.0 < tried.error < _MAX_NUMBER else 0.0


def _draw_ranks(axes: Axes, ranks: Sequence[float]) -> tuple[float, float]:
    """Set up the rank axis with a tick at each power of two, at least two of them. Returns its limits."""
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


def _draw_sizes(canvas: Canvas, band: Axes, truncations: Sequence[TruncationLoss], limits: tuple[float, float]) -> None:
    """Write the size of each truncation above its rank: of the chosen one first, of others if there is room."""
    band.set_axis_off()
    band.set_xscale("log", base=2)
    band.set_xlim(*limits)
    band.set_ylim(0.0, 1.0)
    width = canvas.width - _LEFT - _RIGHT
    octaves = math.log2(limits[1] / limits[0])
    taken: list[tuple[float, float]] = []
    for tried in sorted(truncations, key=lambda tried: not tried.chosen):
        text = size_text(tried.size)
        half = text_width(text) / 2
        # A label at the edge moves inwards, so that it stays on the canvas.
        middle = math.log2(tried.mean_rank / limits[0]) / octaves * width
        middle = min(max(middle, half - _LEFT + 6), width + _RIGHT - 6 - half)
        if any(abs(middle - other) < half + other_half + 6 for other, other_half in taken):
            continue
        taken.append((middle, half))
        colour = canvas.theme.mark if tried.chosen else canvas.theme.ink
        band.text(
            middle / width,
            0.15,
            text,
            transform=band.transAxes,
            fontsize=FONT_SIZE,
            color=colour,
            ha="center",
            va="bottom",
        )
        band.plot([tried.mean_rank] * 2, [0.0, 0.15], color=colour, linewidth=1.0, clip_on=False)


def _draw_losses(canvas: Canvas, axes: Axes, truncations: Sequence[TruncationLoss]) -> None:
    """Draw a line for each kind of truncation."""
    theme = canvas.theme
    looks: dict[TruncationKind, tuple[str, str, str]] = {
        "fixed": ("fixed rank", theme.first, "-o"),
        "energy": ("share of energy", theme.second, "-s"),
        "whole": ("whole", theme.third, "D"),
        "signal": ("signal", theme.ink, "^"),
        "other": ("other", theme.faint, "v"),
    }
    for kind, (label, colour, style) in looks.items():
        found = [tried for tried in truncations if tried.truncation.kind == kind]
        if not found:
            continue
        ranks, losses = [tried.mean_rank for tried in found], [tried.loss for tried in found]
        axes.plot(ranks, losses, style, color=colour, markersize=4.5, linewidth=1.4, label=label)
        bars = [_error(tried) or math.nan for tried in found]
        axes.errorbar(ranks, losses, bars, fmt="none", ecolor=colour, elinewidth=1.0, capsize=2.5, alpha=0.7)
    best = min(tried.loss for tried in truncations)
    axes.axhline(best, color=theme.faint, linewidth=0.9, linestyle=(0, (4, 3)), label="the best", zorder=1)
    for tried in truncations:
        if tried.chosen:
            axes.plot(
                tried.mean_rank,
                tried.loss,
                "o",
                markersize=11,
                color=theme.mark,
                fillstyle="none",
                markeredgewidth=1.8,
            )
    axes.grid(color=theme.grid, linewidth=0.6)
    _set_loss_range(axes, truncations)
    canvas.legend(axes, above=False)


def _set_loss_range(axes: Axes, truncations: Sequence[TruncationLoss]) -> None:
    low, high = (
        min(tried.loss - _error(tried) for tried in truncations),
        max(tried.loss + _error(tried) for tried in truncations),
    )
    pad = 0.1 * (high - low)
    if pad < 1e-6 * max(abs(low), abs(high), 1e-12):  # all equal: the line goes in the middle
        pad = 0.05 * abs(high) or 0.05
    axes.set_ylim(low - pad, high + pad)
    axes.locator_params(axis="y", nbins=5)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")


def _name_chosen(canvas: Canvas, band: Axes, chosen: TruncationLoss, title: str) -> None:
    """Name the chosen truncation right of the heading, as fully as there is room for."""
    room = canvas.width - 30 - text_width(title, HEADING_SIZE)
    size = size_text(chosen.size)
    for text in (f"ring: given, {chosen.name}, {size}", f"ring: given, {size}", f"given: {size}", size):
        if text_width(text, HEADING_SIZE) <= room:
            canvas.heading(band, text, canvas.theme.mark, "right")
            return
