"""The paper that charts are drawn on: size, colours and letters that can be read on a node and at full size.

All drawing is in points of a picture 512 wide; a larger picture gets larger letters and more room. matplotlib is used
through its objects, never pyplot, so nothing global changes; it is imported when the first chart is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


SMALLEST = (256, 160)


LETTER = 10.0  # height of small letters, in points


HEADING = 11.0


_CHARACTER = 0.6  # mean width of a letter beside its height


@dataclass(frozen=True)
class Theme:
    """Colours; the first three that stand for data differ for every kind of colour vision (Okabe and Ito 2008)."""

    paper: str
    ink: str
    faint: str
    grid: str
    first: str
    second: str
    third: str
    mark: str


LIGHT = Theme("#ffffff", "#202020", "#6a6a6a", "#dddddd", "#0072b2", "#d55e00", "#00805c", "#e0115f")


DARK = Theme("#1f1f1f", "#e4e4e4", "#a8a8a8", "#404040", "#56b4e9", "#f0a030", "#3dcaa0", "#ff5c8a")


@dataclass(frozen=True)
class Canvas:
    """An empty picture."""

    figure: Figure
    theme: Theme
    width: float  # points
    height: float

    @property
    def dark(self) -> bool:
        return self.theme is DARK

    def axes(self, left: float, bottom: float, right: float, top: float) -> Axes:
        """Axes with these margins in points, counted from the picture's sides."""
        width, height = self.width - left - right, self.height - bottom - top
        area = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        axes: Axes = self.figure.add_axes(area)
        self.style(axes)
        return axes

    def style(self, axes: Axes) -> None:
        """The theme's colours, and small letters."""
        axes.set_facecolor(self.theme.paper)
        axes.tick_params(colors=self.theme.faint, labelcolor=self.theme.ink, labelsize=LETTER, length=3, pad=2)
        for spine in axes.spines.values():
            spine.set_color(self.theme.grid)
        for axis in (axes.xaxis, axes.yaxis):
            axis.label.set_color(self.theme.ink)
            axis.label.set_fontsize(LETTER)

    def heading(self, axes: Axes, text: str, colour: str | None = None, align: str = "left") -> None:
        """A line above the axes, cut to the picture's width."""
        if align == "left":
            text = shorten(text, self.width - 12, HEADING)
        place = {"x": 8 / self.width} if align == "left" else {"x": 1 - 8 / self.width}
        box = axes.get_position()
        self.figure.text(
            place["x"],
            box.y1 + 5 / self.height,
            text,
            fontsize=HEADING,
            color=colour or self.theme.ink,
            ha=align,
            va="bottom",
            parse_math=False,
        )

    def legend(self, axes: Axes, columns: int = 1, above: bool = True) -> None:
        """The lines that have a label, named to the right of the heading, or within the axes where there is room."""
        place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0)} if above else {"loc": "best"}
        box = axes.legend(
            ncols=columns,
            fontsize=LETTER,
            labelcolor=self.theme.ink,
            facecolor=self.theme.paper,
            framealpha=0.8,
            edgecolor="none",
            handlelength=1.3,
            handletextpad=0.4,
            columnspacing=1.0,
            borderpad=0.2,
            labelspacing=0.25,
            borderaxespad=0.3,
            **place,
        )
        for text in box.get_texts():
            text.set_parse_math(False)

    def draw(self) -> Image.Image:
        """The finished picture, RGB."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def new_paper(size: tuple[int, int], dark: bool) -> Canvas:
    """Paper of a size in pixels, (width, height).

    Raises:
        ValueError: it is too small to read anything.
    """
    from matplotlib.figure import Figure

    width, height = size
    if width < SMALLEST[0] or height < SMALLEST[1]:
        raise ValueError(f"A chart needs {SMALLEST[0]} x {SMALLEST[1]} pixels or more, but {width} x {height} are set.")
    zoom = max(0.75, min(width / 512, height / 320)) ** 0.75
    theme = DARK if dark else LIGHT
    # A hundredth of a pixel more, since matplotlib rounds the number of pixels downwards.
    inches = ((width + 0.01) / (72 * zoom), (height + 0.01) / (72 * zoom))
    figure = Figure(figsize=inches, dpi=72 * zoom, facecolor=theme.paper)
    return Canvas(figure, theme, width / zoom, height / zoom)


def notice(text: str, size: tuple[int, int], dark: bool = False) -> Image.Image:
    """A picture that says in words why there is no chart."""
    paper = new_paper(size, dark)
    lines = [line for part in text.splitlines() for line in wrap(part, int(paper.width / (HEADING * _CHARACTER)) - 4)]
    paper.figure.text(
        0.5,
        0.5,
        "\n".join(lines),
        fontsize=HEADING,
        color=paper.theme.ink,
        ha="center",
        va="center",
        linespacing=1.5,
        parse_math=False,
    )
    return paper.draw()


def text_width(text: str, letter: float = LETTER) -> float:
    """About the width of a text in points."""
    return len(text) * letter * _CHARACTER


def shorten(text: str, width: float, letter: float = LETTER) -> str:
    """The text, or its end after an ellipsis where it is too long for a width in points: names differ at the end."""
    room = max(2, int(width / (letter * _CHARACTER)))
    return text if len(text) <= room else f"…{text[len(text) - room + 1 :]}"


def places_that_fit(count: int, room: float, each: float) -> list[int]:
    """Evenly spaced places out of `count` for labels that take `each` of the `room` there is; the first among them."""
    if count == 0:
        return []
    return list(range(0, count, max(1, -(-int(count * each) // max(1, int(room))))))


def to_batch(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as ComfyUI's IMAGE: (count, height, width, 3), float32, 0 to 1."""
    arrays = [np.asarray(picture.convert("RGB"), dtype=np.float32) / 255.0 for picture in pictures]
    return torch.from_numpy(np.stack(arrays))
