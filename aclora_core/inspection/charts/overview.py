"""The one chart that a node shows of a LoRA, with letters that can be read on a narrow node."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from PIL import Image

from ...adapter import block_kind
from ..measure import LayerFacts
from .canvas import SIZE, Canvas, new_canvas, text_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ZOOM = 2.0  # pixels of a point: twice the letters of the other charts


def rank_chart(layers: list[LayerFacts], size: tuple[int, int] = SIZE, dark: bool = False) -> Image.Image:
    """Draw the mean rank of each block: how much of it is used, as bars before those of the rank in the file.

    What is used are the signal ranks that the training measured, or else the components with 95 % of the energy.

    Raises:
        ValueError: there is no layer.
    """
    if not layers:
        raise ValueError("There is nothing to draw: the LoRA has no plain LoRA layer.")
    blocks: dict[str, list[LayerFacts]] = {}
    for layer in layers:
        blocks.setdefault(layer.block or "others", []).append(layer)
    stored = [_mean([layer.rank for layer in found]) for found in blocks.values()]
    used = [_mean([_used(layer) for layer in found]) for found in blocks.values()]
    canvas = new_canvas(size, dark, ZOOM)
    axes = canvas.axes(28, 22, 8, 24)
    places = range(len(blocks))
    axes.bar(places, stored, 0.86, color=canvas.theme.grid, label=f"in the file {_mean([x.rank for x in layers]):.3g}")
    axes.bar(places, used, 0.86, color=canvas.theme.first, label=f"used {_mean([_used(x) for x in layers]):.3g}")
    axes.set_xlim(-0.6, len(blocks) - 0.4)
    axes.set_ylim(0, 1.4 * max(stored))  # room for the legend
    axes.locator_params(axis="y", nbins=4, integer=True)
    _name_kinds(canvas, axes, list(blocks))
    canvas.heading(axes, "Mean rank of each block")
    canvas.legend(axes, 2, above=False)
    return canvas.draw()


def _used(layer: LayerFacts) -> int:
    return min(layer.shown_rank, layer.rank)


def _mean(values: list[int]) -> float:
    return sum(values) / len(values)


def _name_kinds(canvas: Canvas, axes: Axes, blocks: list[str]) -> None:
    """Write the kind of the blocks below the middle of each run of one kind, where there is room."""
    room = (canvas.width - 36) / len(blocks)  # points of a block
    places: list[float] = []
    names: list[str] = []
    end = -canvas.width
    for kind, run in groupby(enumerate(blocks), key=lambda item: _kind(item[1])):
        numbers = [place for place, _ in run]
        middle, half = (numbers[0] + numbers[-1]) / 2, text_width(kind) / 2
        if middle * room - half >= end:
            places.append(middle)
            names.append(kind)
            end = middle * room + half + 4
    axes.set_xticks(places, names)
    axes.tick_params(axis="x", length=0)


def _kind(block: str) -> str:
    """Return the kind of a block in few letters: "joint" for "joint_blocks.3"."""
    return block_kind(block).removesuffix("_blocks").removesuffix("_block")
