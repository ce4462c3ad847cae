"""Charts over the layers of a LoRA: their spectra, and a number for each as a map of blocks and modules."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ...adapter import block_kind, natural_order, place_of
from .canvas import LETTER, Canvas, new_paper, places_that_fit, shorten, text_width
from .training import SIZE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage


CURVES = 8  # layers that can be told apart as curves; more become a heat map


DECADES = 4  # below the largest singular value; what is smaller is drawn as this small


COLOURS = "viridis"


def spectrum_chart(
    spectra: Mapping[str, Sequence[float]],
    signal: Mapping[str, int] | None = None,
    size: tuple[int, int] = SIZE,
    dark: bool = False,
) -> Image.Image:
    """The singular values of every layer: curves for few layers, a heat map of layers × components for many.

    spectra: base name -> values, sorted downwards. signal: how many of them are signal, drawn as a border.

    Raises:
        ValueError: there is no layer, or a layer without values.
    """
    if not spectra or not all(len(values) for values in spectra.values()):
        raise ValueError("There are no singular values to draw: the LoRA has no plain LoRA layer.")
    paper = new_paper(size, dark)
    names = sorted(spectra, key=natural_order)
    counts = [min((signal or {}).get(name, 0), len(spectra[name])) for name in names]
    draw = _draw_curves if len(names) <= CURVES else _draw_spectra
    draw(paper, names, [np.asarray(spectra[name], dtype=np.float64) for name in names], counts)
    return paper.draw()


def layer_map(values: Mapping[str, float], title: str, size: tuple[int, int] = SIZE, dark: bool = False) -> Image.Image:
    """A number for each layer, as a heat map of blocks (across) and modules (down).

    values: base name -> number, 0 or more. Layers outside blocks are left out where others lie in blocks; of several
    layers in one place the mean is drawn.

    Raises:
        ValueError: there is no layer.
    """
    if not values:
        raise ValueError("There is nothing to draw: the LoRA has no plain LoRA layer.")
    names = sorted(values, key=natural_order)
    shown = [name for name in names if place_of(name).block] or names
    cells: dict[tuple[str, str], list[float]] = {}
    for name in shown:
        cells.setdefault((place_of(name).block, place_of(name).module), []).append(values[name])
    blocks, modules = (list(dict.fromkeys(cell[part] for cell in cells)) for part in (0, 1))
    table = np.full((len(modules), len(blocks)), np.nan)
    for (block, module), found in cells.items():
        table[modules.index(module), blocks.index(block)] = math.fsum(found) / len(found)
    paper = new_paper(size, dark)
    axes, picture = _draw_map(paper, table, blocks, modules)
    if all(float(value).is_integer() for value in values.values()):
        _write_numbers(paper, axes, picture, table)
    outside = len(names) - len(shown)
    paper.heading(axes, title + (f" ({outside} outside blocks not drawn)" if outside else ""))
    return paper.draw()


def _draw_curves(paper: Canvas, names: Sequence[str], values: Sequence[np.ndarray], signal: Sequence[int]) -> None:
    from matplotlib import colormaps

    axes = paper.axes(44, 32, 12, 22)
    largest = max(float(each[0]) for each in values) or 1.0
    floor = largest / 10**DECADES
    shades = colormaps[COLOURS](np.linspace(*((0.25, 1.0) if paper.dark else (0.0, 0.85)), len(names)))
    for name, each, count, shade in zip(names, values, signal, shades, strict=True):
        label = shorten(place_of(name).label, paper.width * 0.45)
        heights = np.maximum(each, floor)
        dot = 4.0 if len(each) <= 40 else 0.0
        axes.plot(np.arange(1, len(each) + 1), heights, "-o", markersize=dot, color=shade, linewidth=1.4, label=label)
        if count:
            axes.plot(count, heights[count - 1], "o", markersize=8, color=paper.theme.mark, fillstyle="none")
    axes.set_xlim(0.5, max(map(len, values)) + 0.5)
    axes.locator_params(axis="x", integer=True)
    axes.set_yscale("log")
    axes.set_ylim(floor * 0.8, largest * 1.6)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(which="minor", length=0)
    axes.grid(color=paper.theme.grid, linewidth=0.6)
    axes.set_xlabel("component", labelpad=1)
    paper.heading(axes, "Size of each component")
    if any(signal):
        paper.heading(axes, "ring: last component of signal", paper.theme.mark, "right")
    paper.legend(axes, above=False)


def _draw_spectra(paper: Canvas, names: Sequence[str], values: Sequence[np.ndarray], signal: Sequence[int]) -> None:
    """A row for each layer, a column for each component; colour is the size beside the largest of all."""
    largest = max(float(each[0]) for each in values) or 1.0
    table = np.full((len(names), max(map(len, values))), np.nan)
    for row, each in zip(table, values, strict=True):
        row[: len(each)] = np.log10(np.maximum(each / largest, 10.0**-DECADES))
    labels, places = _row_labels(paper, names)
    left = 10 + max(text_width(label) for label in labels)
    axes = paper.axes(left, 32, 62, 22)
    picture = axes.imshow(np.ma.masked_invalid(table), aspect="auto", cmap=COLOURS, vmin=-DECADES, vmax=0.0)
    axes.set_yticks(places, labels)
    axes.set_xticks(*_component_ticks(table.shape[1], paper.width - left - 62))
    axes.set_xlabel("component", labelpad=1)
    _add_scale(paper, axes, picture, lambda power: _short(largest * 10.0**power), range(-DECADES, 1))
    paper.heading(axes, f"Size of each component, {len(names)} layers")
    if any(signal):
        # Rows thinner than the line would make it a blot: there it shows the mean of neighbours.
        group = -(-len(names) * 4 // int(paper.height - 54))
        edges = np.array([*range(0, len(names), group), len(names)])
        means = np.add.reduceat(signal, edges[:-1]) / np.diff(edges)
        axes.stairs(means - 0.5, edges - 0.5, orientation="horizontal", baseline=None, color=paper.theme.mark)
        paper.heading(axes, f"line: end of the signal{', mean' if group > 1 else ''}", paper.theme.mark, "right")


def _short(number: float) -> str:
    return f"{number:.3g}" if number >= 1.0 else f"{number:.1g}"


def _row_labels(paper: Canvas, names: Sequence[str]) -> tuple[list[str], list[int]]:
    """Every layer's name where there is room for it, else the blocks where they begin, as many as fit."""
    room, line = paper.height - 54, LETTER * 1.25
    if len(names) * line <= room:
        return [shorten(place_of(name).label, paper.width * 0.4) for name in names], list(range(len(names)))
    blocks = [place_of(name).block or "others" for name in names]
    starts = [row for row, block in enumerate(blocks) if row == 0 or blocks[row - 1] != block]
    places = _apart(starts, line * len(names) / room)
    return [shorten(blocks[row], paper.width * 0.3) for row in places], places


def _apart(places: Sequence[int], distance: float) -> list[int]:
    """Those of the rising places that lie at least so far from the one before."""
    kept: list[int] = []
    for place in places:
        if not kept or place - kept[-1] >= distance:
            kept.append(place)
    return kept


def _component_ticks(count: int, room: float) -> tuple[list[int], list[str]]:
    """Places and names of columns counted from 1, at round numbers."""
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, count) if step * room / count >= 2.5 * LETTER)
    numbers = [1, *range(step, count + 1, step)] if step > 1 else list(range(1, count + 1))
    return [number - 1 for number in numbers], [str(number) for number in numbers]


def _draw_map(
    paper: Canvas, table: np.ndarray, blocks: Sequence[str], modules: Sequence[str]
) -> tuple[Axes, AxesImage]:
    from matplotlib.colors import PowerNorm

    names = [shorten(module, paper.width * 0.3) for module in modules]
    left = 10 + max(map(text_width, names))
    axes = paper.axes(left, 44, 54, 22)
    room = paper.width - left - 54, paper.height - 66
    top = float(np.nanmax(table)) or 1.0
    # A square root, so that one large layer does not leave the others in the dark.
    norm = PowerNorm(0.5, vmin=0.0, vmax=top)
    picture = axes.imshow(np.ma.masked_invalid(table), aspect="auto", cmap=COLOURS, norm=norm)
    rows = places_that_fit(len(names), room[1], LETTER)
    axes.set_yticks(rows, [names[row] for row in rows])
    _add_scale(paper, axes, picture, lambda value: f"{value:.3g}", None)
    _label_blocks(paper, axes, blocks, room)
    return axes, picture


def _label_blocks(paper: Canvas, axes: Axes, blocks: Sequence[str], room: tuple[float, float]) -> None:
    """The numbers of the blocks below the columns, the kinds of blocks below the numbers, with a line between kinds."""
    kinds = [block_kind(block) for block in blocks]
    numbers = [block.removeprefix(kind).lstrip(".") for block, kind in zip(blocks, kinds, strict=True)]
    columns = places_that_fit(len(blocks), room[0], max(map(text_width, numbers)) + 0.8 * LETTER)
    axes.set_xticks(columns, [numbers[column] for column in columns])
    starts = [column for column, kind in enumerate(kinds) if column == 0 or kinds[column - 1] != kind]
    for start, end in zip(starts, [*starts[1:], len(kinds)], strict=True):
        if start:
            axes.axvline(start - 0.5, color=paper.theme.ink, linewidth=1.0)
        width = (end - start) * room[0] / len(kinds)
        if width > 3 * LETTER:
            middle, below = (start + end) / 2 / len(kinds), -(16 + LETTER) / room[1]
            name = shorten(re.sub(r"(_blocks?| layers)$", "", kinds[start]), width)
            axes.text(
                middle,
                below,
                name,
                transform=axes.transAxes,
                ha="center",
                va="center",
                fontsize=LETTER,
                color=paper.theme.ink,
                parse_math=False,
            )


def _add_scale(
    paper: Canvas, axes: Axes, picture: AxesImage, name: Callable[[float], str], ticks: Sequence[float] | None
) -> None:
    """The scale of colours to the right of the axes."""
    box = axes.get_position()
    scale = paper.figure.add_axes((box.x1 + 8 / paper.width, box.y0, 10 / paper.width, box.height))
    bar = paper.figure.colorbar(picture, cax=scale, ticks=ticks, format=lambda value, _: name(value))
    paper.style(scale)
    bar.outline.set_visible(False)


def _write_numbers(paper: Canvas, axes: Axes, picture: AxesImage, table: np.ndarray) -> None:
    """The number in each cell, where the cells have room for it."""
    box = axes.get_position()
    width, height = box.width * paper.width / table.shape[1], box.height * paper.height / table.shape[0]
    numbers = {place: f"{value:.0f}" for place, value in np.ndenumerate(table) if math.isfinite(value)}
    if max(map(text_width, numbers.values())) + 2 > width or height < LETTER * 1.1:
        return
    for (row, column), text in numbers.items():
        red, green, blue, _ = picture.cmap(picture.norm(table[row, column]))
        bright = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
        axes.text(column, row, text, ha="center", va="center", fontsize=LETTER, color="black" if bright else "white")
