"""Charts over the steps of a training: the live chart of the node, and the restarts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ...adapter import RankReport, Restart, recent_loss
from .canvas import SIZE, Canvas, new_canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_LEFT, _RIGHT = 44.0, 20.0  # margins in points


_MAX_POINTS = 400  # a line with more points than pixels only takes longer


def training_chart(
    losses: Sequence[float],
    total_steps: int,
    restarts: Sequence[Restart] = (),
    validation: Sequence[tuple[int, float]] = (),
    size: tuple[int, int] = SIZE,
    dark: bool = False,
    fit: Sequence[tuple[int, float]] = (),
    zoom: float = 0.0,
) -> Image.Image:
    """Draw the loss of a training, and below it the components that each restart kept. Takes some 50 ms.

    Args:
        losses: of the steps so far.
        total_steps: planned.
        validation: step and loss on held-out images.
        size: width and height in pixels.
        dark: light letters on a dark background.
        fit: step and loss of training images at fixed noise.
        zoom: pixels of a point, for larger letters; 0 for what suits the size.
    """
    canvas = new_canvas(size, dark, zoom)
    split = 0.42 * canvas.height if restarts else 0.0
    upper = canvas.axes(_LEFT, max(split + 10, 32.0), _RIGHT, 22)
    steps = max(total_steps, len(losses), 1)
    # A short training would be a thin strip: the axis grows by doubling.
    view = max(steps / 2 ** max(0, math.floor(math.log2(steps / max(1, len(losses))))), min(steps, 10))
    _draw_losses(canvas, upper, losses, {"validation": validation, "training images": fit})
    _mark_restarts(canvas, upper, restarts)
    loss = recent_loss(losses)
    canvas.heading(upper, f"Step {len(losses):,} of {steps:,}" + (f", loss {loss:.3f}" if loss is not None else ""))
    lower = upper
    if restarts:
        upper.tick_params(labelbottom=False)
        lower = canvas.axes(_LEFT, 32, _RIGHT, canvas.height - split + 12)
        top = _draw_kept(canvas, lower, restarts)
        lower.set_ylim(0, top * 1.1)
        _mark_restarts(canvas, lower, restarts)
        canvas.heading(lower, "Rank kept", canvas.theme.second)
        canvas.legend(lower, 3)
    for axes in (upper, lower):
        axes.set_xlim(0, view)
    lower.set_xlabel("step", labelpad=1)
    return canvas.draw()


def trajectory_chart(report: RankReport, size: tuple[int, int] = SIZE, dark: bool = False) -> Image.Image:
    """Draw the restarts: ranks above; below their cause (loss, threshold) and effect (energy kept, jump of the delta).

    Raises:
        ValueError: the report has no restart.
    """
    if not report.restarts:
        raise ValueError(
            "The rank report has no restart, so there is no trajectory. Switch restarts on, or train longer."
        )
    canvas = new_canvas(size, dark)
    split = 0.45 * canvas.height
    upper = canvas.axes(_LEFT, split + 10, _RIGHT, 22)
    lower = canvas.axes(_LEFT, 32, _RIGHT, canvas.height - split + 14)
    steps = [restart.step for restart in report.restarts]
    top = _draw_kept(canvas, upper, report.restarts)
    for part, name, style in (("kept_down", "lora_down", "--"), ("kept_up", "lora_up", ":")):
        means = [_mean([getattr(rank, part) for rank in restart.layers.values()]) for restart in report.restarts]
        upper.plot(steps, means, style, color=canvas.theme.ink, linewidth=1.2, label=f"mean in {name}")
        top = max(top, *means)
    # The legend has the room above the highest band: two lines of letters.
    upper.set_ylim(0, top / (1 - 34 / (canvas.height - split - 32)))
    upper.tick_params(labelbottom=False)
    canvas.heading(upper, f"Rank kept at each restart, {len(report.layer_names())} layers")
    canvas.legend(upper, 3, above=False)
    _draw_shares(canvas, lower, report.restarts)
    for axes in (upper, lower):
        first, last = steps[0], max(steps[-1], len(report.losses))
        pad = 0.03 * max(1, last - first)
        axes.set_xlim(max(0, first - pad), last + pad)
    lower.set_xlabel("step", labelpad=1)
    canvas.heading(lower, "Cause and effect")
    return canvas.draw()


def _draw_losses(
    canvas: Canvas, axes: Axes, losses: Sequence[float], measured: Mapping[str, Sequence[tuple[int, float]]]
) -> None:
    """Draw each step faint, the running mean bold, measurements as dots; single spikes do not set the scale.

    measured: step and loss of each measurement, by what the legend calls them.
    """
    theme = canvas.theme
    axes.grid(axis="y", color=theme.grid, linewidth=0.6)
    values = np.asarray(losses, dtype=np.float64)
    finite = np.isfinite(values)
    if not finite.any() and not any(measured.values()):
        axes.set_yticks([])
        axes.text(0.5, 0.5, "waiting for the first step", transform=axes.transAxes, ha="center", color=theme.faint)
        return
    window = max(1, min(len(values) // 15, 100))
    smooth = _running_mean(values, window)
    group = -(-max(1, len(values)) // _MAX_POINTS)
    starts = np.arange(0, len(values), group)
    if group == 1:
        axes.plot(starts + 1, values, color=theme.first, linewidth=0.8, alpha=0.4)
    else:
        lowest, highest = np.fmin.reduceat(values, starts), np.fmax.reduceat(values, starts)
        axes.fill_between(starts + 1, lowest, highest, color=theme.first, alpha=0.25, linewidth=0)
    dot = "o" if finite.sum() == 1 else ""  # one step makes no line
    axes.plot(starts + 1, smooth[starts], color=theme.first, linewidth=1.8, label="training", marker=dot, markersize=4)
    # A spike may leave the chart, in the mean too: it would flatten all else.
    seen = np.append(np.quantile(values[finite], (0.01, 0.99)), smooth[finite][-1]) if finite.any() else np.empty(0)
    for label, curve in measured.items():
        if curve:
            at, values_there = zip(*curve, strict=True)
            axes.plot(at, values_there, "o-", color=theme.third, markersize=3.5, linewidth=1.2, label=label)
            seen = np.concatenate([seen, [value for value in values_there if math.isfinite(value)]])
    if any(measured.values()):
        canvas.legend(axes, 2)
    low, high = (float(seen.min()), float(seen.max())) if len(seen) else (0.0, 1.0)
    pad = 0.08 * (high - low) or 0.05 * abs(high) or 0.05
    axes.set_ylim(low - pad, high + pad)
    axes.locator_params(axis="y", nbins=5)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")


def _draw_kept(canvas: Canvas, axes: Axes, restarts: Sequence[Restart]) -> float:
    """Draw the mean rank of the delta over the layers, the range and the middle 80 %. Returns the highest rank."""
    theme = canvas.theme
    steps = [restart.step for restart in restarts]
    counts = [_kept_delta(restart) for restart in restarts]
    low, tenth, ninetieth, high = np.array([np.quantile(kept, (0.0, 0.1, 0.9, 1.0)) for kept in counts]).T
    axes.fill_between(steps, low, high, color=theme.second, alpha=0.18, linewidth=0, label="all layers")
    axes.fill_between(steps, tenth, ninetieth, color=theme.second, alpha=0.32, linewidth=0, label="middle 80 %")
    means = [_mean(kept) for kept in counts]
    size = 4.0 if len(steps) <= 40 else 0.0
    axes.plot(steps, means, "-o", color=theme.second, linewidth=1.8, markersize=size, label="mean")
    if len(steps) == 1:  # a band of one step has no width
        axes.vlines(steps, low, high, color=theme.second, linewidth=5, alpha=0.3)
    axes.grid(axis="y", color=theme.grid, linewidth=0.6)
    axes.locator_params(axis="y", nbins=5, integer=True)
    return max(float(high.max()), 1.0)


def _draw_shares(canvas: Canvas, axes: Axes, restarts: Sequence[Restart]) -> None:
    theme = canvas.theme
    steps = [restart.step for restart in restarts]
    energy = [_mean([rank.energy for rank in restart.layers.values()]) for restart in restarts]
    curves = [(energy, "energy kept", theme.third, "-"), ([r.loss for r in restarts], "loss", theme.first, "--")]
    jumps = [math.nan if jump is None else jump for jump in (restart.mean_jump() for restart in restarts)]
    if not all(map(math.isnan, jumps)):
        curves.append((jumps, "jump", theme.mark, "-."))
    thresholds = [math.nan if restart.threshold == "noise floor" else restart.threshold for restart in restarts]
    if not all(map(math.isnan, thresholds)):
        curves.insert(0, (thresholds, "threshold", theme.second, "-"))
    size = 3.5 if len(steps) <= 40 else 0.0
    for values, name, colour, style in curves:
        axes.plot(steps, values, style, marker="o", markersize=size, color=colour, linewidth=1.5, label=name)
    axes.grid(axis="y", color=theme.grid, linewidth=0.6)
    top = max([1.0, *(value for value in (*(r.loss for r in restarts), *jumps) if math.isfinite(value))])
    axes.set_ylim(0, top * 1.05)
    axes.locator_params(axis="y", nbins=5)
    canvas.legend(axes, len(curves))


def _mark_restarts(canvas: Canvas, axes: Axes, restarts: Sequence[Restart]) -> None:
    """Draw a thin line at each restart; paler if there are many."""
    if not 0 < len(restarts) <= 100:
        return
    strength = min(0.9, 15 / len(restarts))
    axes.vlines(
        [restart.step for restart in restarts],
        0,
        1,
        transform=axes.get_xaxis_transform(),
        color=canvas.theme.faint,
        linewidth=0.7,
        linestyle=(0, (4, 3)),
        alpha=strength,
    )


def _kept_delta(restart: Restart) -> list[int]:
    return [rank.kept_delta for rank in restart.layers.values()] or [0]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of the last `window` finite values at each index; the first means are of fewer."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    number = counts[ends] - counts[starts]
    return np.where(number > 0, (sums[ends] - sums[starts]) / np.maximum(number, 1), np.nan)
