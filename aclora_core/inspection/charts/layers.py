"""Charts over the layers of a LoRA: their spectra, and a number per layer as a map of blocks and modules."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ...adapter import block_kind, layer_sort_key, parse_layer_name
from .canvas import FONT_SIZE, SIZE, Canvas, new_canvas, shorten, text_width, tick_indices

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage


MAX_CURVES = 8  # layers that can be told apart as curves; more become a heat map


DECADES = 4  # below the largest singular value; smaller values are drawn at this floor


COLOUR_MAP = "viridis"


def spectrum_chart(
    spectra: Mapping[str, Sequence[float]],
    signal: Mapping[str, int] | None = None,
    size: tuple[int, int] = SIZE,
    dark: bool = False,
) -> Image.Image:
    """Draw the singular values of every layer: curves for few layers, a heat map of layers × components for many.

    Args:
        spectra: base name -> singular values, descending.
        signal: base name -> signal rank, drawn as a border.
        size: width and height in pixels.

    Raises:
        ValueError: there is no layer, or a layer without values.
    """
    if not spectra or not all(len(values) for values in spectra.values()):
        raise ValueError("There are no singular values to draw: the LoRA has no plain LoRA layer.")
    canvas = new_canvas(size, dark)
    names = sorted(spectra, key=layer_sort_key)
    counts = [min((signal or {}).get(name, 0), len(spectra[name])) for name in names]
    draw = _draw_curves if len(names) <= MAX_CURVES else _draw_spectra
    draw(canvas, names, [np.asarray(spectra[name], dtype=np.float64) for name in names], counts)
    return canvas.draw()


def layer_map(values: Mapping[str, float], title: str, size: tuple[int, int] = SIZE, dark: bool = False) -> Image.Image:
    """Draw a number per layer as a heat map of blocks (across) and modules (down).

    Layers outside blocks are left out if there are others; a cell of several layers shows their mean.

    Args:
        values: base name -> number, 0 or more.
        title: the heading.
        size: width and height in pixels.

    Raises:
        ValueError: there is no layer.
    """
    if not values:
        raise ValueError("There is nothing to draw: the LoRA has no plain LoRA layer.")
    names = sorted(values, key=layer_sort_key)
    shown = [name for name in names if parse_layer_name(name).block] or names
    cells: dict[tuple[str, str], list[float]] = {}
    for name in shown:
        parsed = parse_layer_name(name)
        cells.setdefault((parsed.block, parsed.module), []).append(values[name])
    blocks = list(dict.fromkeys(block for block, _ in cells))
    modules = list(dict.fromkeys(module for _, module in cells))
    table = np.full((len(modules), len(blocks)), np.nan)
    for (block, module), found in cells.items():
        table[modules.index(module), blocks.index(block)] = math.fsum(found) / len(found)
    canvas = new_canvas(size, dark)
    axes, heat_map = _draw_map(canvas, table, blocks, modules)
    if all(float(value).is_integer() for value in values.values()):
        _write_numbers(canvas, axes, heat_map, table)
    outside = len(names) - len(shown)
    canvas.heading(axes, title + (f" ({outside} outside blocks not drawn)" if outside else ""))
    return canvas.draw()


def _draw_curves(canvas: Canvas, names: Sequence[str], values: Sequence[np.ndarray], signal: Sequence[int]) -> None:
    from matplotlib import colormaps

    axes = canvas.axes(44, 32, 12, 22)
    largest = max(float(each[0]) for each in values) or 1.0
    floor = largest / 10**DECADES
    shades = colormaps[COLOUR_MAP](np.linspace(*((0.25, 1.0) if canvas.dark else (0.0, 0.85)), len(names)))
    for name, each, count, shade in zip(names, values, signal, shades, strict=True):
        label = shorten(parse_layer_name(name).label, canvas.width * 0.45)
        heights = np.maximum(each, floor)
        dot = 4.0 if len(each) <= 40 else 0.0
        axes.plot(np.arange(1, len(each) + 1), heights, "-o", markersize=dot, color=shade, linewidth=1.4, label=label)
        if count:
            axes.plot(count, heights[count - 1], "o", markersize=8, color=canvas.theme.mark, fillstyle="none")
    axes.set_xlim(0.5, max(map(len, values)) + 0.5)
    axes.locator_params(axis="x", integer=True)
    axes.set_yscale("log")
    axes.set_ylim(floor * 0.8, largest * 1.6)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(which="minor", length=0)
    axes.grid(color=canvas.theme.grid, linewidth=0.6)
    axes.set_xlabel("component", labelpad=1)
    canvas.heading(axes, "Singular values")
    if any(signal):
        canvas.heading(axes, "ring: end of the signal", canvas.theme.mark, "right")
    canvas.legend(axes, above=False)


def _draw_spectra(canvas: Canvas, names: Sequence[str], values: Sequence[np.ndarray], signal: Sequence[int]) -> None:
    """Draw a row per layer and a column per component; the colour is the size relative to the largest of all."""
    largest = max(float(each[0]) for each in values) or 1.0
    table = np.full((len(names), max(map(len, values))), np.nan)
    for row, each in zip(table, values, strict=True):
        row[: len(each)] = np.log10(np.maximum(each / largest, 10.0**-DECADES))
    labels, rows = _row_labels(canvas, names)
    left = 10 + max(text_width(label) for label in labels)
    axes = canvas.axes(left, 32, 62, 22)
    heat_map = axes.imshow(np.ma.masked_invalid(table), aspect="auto", cmap=COLOUR_MAP, vmin=-DECADES, vmax=0.0)
    axes.set_yticks(rows, labels)
    axes.set_xticks(*_component_ticks(table.shape[1], canvas.width - left - 62))
    axes.set_xlabel("component", labelpad=1)
    _add_scale(canvas, axes, heat_map, lambda power: _short(largest * 10.0**power), range(-DECADES, 1))
    canvas.heading(axes, f"Singular values, {len(names)} layers")
    if any(signal):
        # Where rows are thinner than the line, it shows the mean of neighbours.
        group = -(-len(names) * 4 // int(canvas.height - 54))
        edges = np.array([*range(0, len(names), group), len(names)])
        means = np.add.reduceat(signal, edges[:-1]) / np.diff(edges)
        axes.stairs(means - 0.5, edges - 0.5, orientation="horizontal", baseline=None, color=canvas.theme.mark)
        canvas.heading(axes, f"line: end of the signal{', mean' if group > 1 else ''}", canvas.theme.mark, "right")


def _short(number: float) -> str:
    return f"{number:.3g}" if number >= 1.0 else f"{number:.1g}"


def _row_labels(canvas: Canvas, names: Sequence[str]) -> tuple[list[str], list[int]]:
    """Return labels and rows: every layer's name if there is room, else the first row of each block, as many as fit."""
    room, line = canvas.height - 54, FONT_SIZE * 1.25
    if len(names) * line <= room:
        return [shorten(parse_layer_name(name).label, canvas.width * 0.4) for name in names], list(range(len(names)))
    blocks = [parse_layer_name(name).block or "others" for name in names]
    starts = [row for row, block in enumerate(blocks) if row == 0 or blocks[row - 1] != block]
    rows = _at_least_apart(starts, line * len(names) / room)
    return [shorten(blocks[row], canvas.width * 0.3) for row in rows], rows


def _at_least_apart(rows: Sequence[int], distance: float) -> list[int]:
    """Thin out ascending rows, so that neighbours are at least `distance` apart."""
    kept: list[int] = []
    for row in rows:
        if not kept or row - kept[-1] >= distance:
            kept.append(row)
    return kept


def _component_ticks(count: int, room: float) -> tuple[list[int], list[str]]:
    """Return indices and labels of component ticks, at round numbers counted from 1."""
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, count) if step * room / count >= 2.5 * FONT_SIZE)
    numbers = [1, *range(step, count + 1, step)] if step > 1 else list(range(1, count + 1))
    return [number - 1 for number in numbers], [str(number) for number in numbers]


def _draw_map(
    canvas: Canvas, table: np.ndarray, blocks: Sequence[str], modules: Sequence[str]
) -> tuple[Axes, AxesImage]:
    from matplotlib.colors import PowerNorm

    names = [shorten(module, canvas.width * 0.3) for module in modules]
    left = 10 + max(map(text_width, names))
    axes = canvas.axes(left, 44, 54, 22)
    room = canvas.width - left - 54, canvas.height - 66
    top = float(np.nanmax(table)) or 1.0
    # A square root, so that one large layer does not leave the others in the dark.
    norm = PowerNorm(0.5, vmin=0.0, vmax=top)
    heat_map = axes.imshow(np.ma.masked_invalid(table), aspect="auto", cmap=COLOUR_MAP, norm=norm)
    rows = tick_indices(len(names), room[1], FONT_SIZE)
    axes.set_yticks(rows, [names[row] for row in rows])
    _add_scale(canvas, axes, heat_map, lambda value: f"{value:.3g}", None)
    _label_blocks(canvas, axes, blocks, room)
    return axes, heat_map


def _label_blocks(canvas: Canvas, axes: Axes, blocks: Sequence[str], room: tuple[float, float]) -> None:
    """Write block numbers below the columns and kinds of blocks below the numbers, with a line between kinds."""
    kinds = [block_kind(block) for block in blocks]
    numbers = [block.removeprefix(kind).lstrip(".") for block, kind in zip(blocks, kinds, strict=True)]
    columns = tick_indices(len(blocks), room[0], max(map(text_width, numbers)) + 0.8 * FONT_SIZE)
    axes.set_xticks(columns, [numbers[column] for column in columns])
    starts = [column for column, kind in enumerate(kinds) if column == 0 or kinds[column - 1] != kind]
    for start, end in zip(starts, [*starts[1:], len(kinds)], strict=True):
        if start:
            axes.axvline(start - 0.5, color=canvas.theme.ink, linewidth=1.0)
        width = (end - start) * room[0] / len(kinds)
        if width > 3 * FONT_SIZE:
            middle, below = (start + end) / 2 / len(kinds), -(16 + FONT_SIZE) / room[1]
            name = shorten(re.sub(r"(_blocks?| layers)$", "", kinds[start]), width)
            axes.text(
                middle,
                below,
                name,
                transform=axes.transAxes,
                ha="center",
                va="center",
                fontsize=FONT_SIZE,
                color=canvas.theme.ink,
                parse_math=False,
            )


def _add_scale(
    canvas: Canvas, axes: Axes, heat_map: AxesImage, name: Callable[[float], str], ticks: Sequence[float] | None
) -> None:
    """Add the colour scale to the right of the axes."""
    box = axes.get_position()
    scale = canvas.figure.add_axes((box.x1 + 8 / canvas.width, box.y0, 10 / canvas.width, box.height))
    bar = canvas.figure.colorbar(heat_map, cax=scale, ticks=ticks, format=lambda value, _: name(value))
    canvas.style(scale)
    bar.outline.set_visible(False)


def _write_numbers(canvas: Canvas, axes: Axes, heat_map: AxesImage, table: np.ndarray) -> None:
    """Write the number into each cell, if all of them have room for it."""
    box = axes.get_position()
    width, height = box.width * canvas.width / table.shape[1], box.height * canvas.height / table.shape[0]
    numbers = {cell: f"{value:.0f}" for cell, value in np.ndenumerate(table) if math.isfinite(value)}
    if max(map(text_width, numbers.values())) + 2 > width or height < FONT_SIZE * 1.1:
        return
    for (row, column), text in numbers.items():
        red, green, blue, _ = heat_map.cmap(heat_map.norm(table[row, column]))
        bright = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
        axes.text(column, row, text, ha="center", va="center", fontsize=FONT_SIZE, color="black" if bright else "white")
