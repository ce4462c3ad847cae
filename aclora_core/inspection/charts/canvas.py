"""Canvas of the charts: size, theme and font sizes that are readable on a node and at full size.

Coordinates are in points of an image 512 wide; a larger image gets larger letters and more room. matplotlib is used
through its objects, never pyplot, so nothing global changes; it is imported when the first chart is drawn.
"""

from __future__ import annotations

import math
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


SIZE = (512, 320)  # default width and height in pixels; a node shows it without scaling


MIN_SIZE = (256, 160)


FONT_SIZE = 10.0  # points


HEADING_SIZE = 11.0  # points


_CHARACTER_WIDTH = 0.6  # mean width of a letter over the font size


@dataclass(frozen=True)
class Theme:
    """Colours of a chart; first, second and third differ for every kind of colour vision (Okabe and Ito 2008)."""

    background: str
    ink: str  # text
    faint: str  # secondary text and lines
    grid: str
    first: str  # data
    second: str
    third: str
    mark: str  # what is chosen or signal


LIGHT = Theme("#ffffff", "#202020", "#6a6a6a", "#dddddd", "#0072b2", "#d55e00", "#00805c", "#e0115f")


DARK = Theme("#1f1f1f", "#e4e4e4", "#a8a8a8", "#404040", "#56b4e9", "#f0a030", "#3dcaa0", "#ff5c8a")


def theme(dark: bool) -> Theme:
    """Return the colours of everything that is drawn: of charts, and of sheets of images."""
    return DARK if dark else LIGHT


@dataclass(frozen=True)
class Canvas:
    """A matplotlib figure with its theme and its size in points."""

    figure: Figure
    theme: Theme
    width: float  # points
    height: float

    @property
    def dark(self) -> bool:
        """Whether the canvas has the dark theme."""
        return self.theme is DARK

    def axes(self, left: float, bottom: float, right: float, top: float) -> Axes:
        """Add axes with these margins to the sides of the image, in points."""
        width, height = self.width - left - right, self.height - bottom - top
        area = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        axes: Axes = self.figure.add_axes(area)
        self.style(axes)
        return axes

    def style(self, axes: Axes) -> None:
        """Apply the theme's colours and the small font to axes."""
        axes.set_facecolor(self.theme.background)
        axes.tick_params(colors=self.theme.faint, labelcolor=self.theme.ink, labelsize=FONT_SIZE, length=3, pad=2)
        for spine in axes.spines.values():
            spine.set_color(self.theme.grid)
        for axis in (axes.xaxis, axes.yaxis):
            axis.label.set_color(self.theme.ink)
            axis.label.set_fontsize(FONT_SIZE)

    def heading(self, axes: Axes, text: str, colour: str | None = None, align: str = "left") -> None:
        """Write a heading above the axes, shortened to the width of the image."""
        if align == "left":
            text = shorten(text, self.width - 12, HEADING_SIZE)
        margin = 8 / self.width
        box = axes.get_position()
        self.figure.text(
            margin if align == "left" else 1 - margin,
            box.y1 + 5 / self.height,
            text,
            fontsize=HEADING_SIZE,
            color=colour or self.theme.ink,
            ha=align,
            va="bottom",
            parse_math=False,
        )

    def legend(self, axes: Axes, columns: int = 1, above: bool = True) -> None:
        """Add a legend of the labelled lines: to the right of the heading, or inside the axes."""
        position: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0)} if above else {"loc": "best"}
        box = axes.legend(
            ncols=columns,
            fontsize=FONT_SIZE,
            labelcolor=self.theme.ink,
            facecolor=self.theme.background,
            framealpha=0.8,
            edgecolor="none",
            handlelength=1.3,
            handletextpad=0.4,
            columnspacing=1.0,
            borderpad=0.2,
            labelspacing=0.25,
            borderaxespad=0.3,
            **position,
        )
        for text in box.get_texts():
            text.set_parse_math(False)

    def draw(self) -> Image.Image:
        """Render the figure as an RGB image."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def new_canvas(size: tuple[int, int], dark: bool, zoom: float = 0.0) -> Canvas:
    """Create an empty canvas.

    Args:
        size: width and height in pixels.
        dark: whether to use the dark theme.
        zoom: pixels of a point; 0 for what suits the size.

    Raises:
        ValueError: the size is below MIN_SIZE, where nothing can be read.
    """
    from matplotlib.figure import Figure

    width, height = size
    if width < MIN_SIZE[0] or height < MIN_SIZE[1]:
        raise ValueError(f"A chart needs {MIN_SIZE[0]} x {MIN_SIZE[1]} pixels or more, but {width} x {height} are set.")
    zoom = zoom or max(0.75, min(width / 512, height / 320)) ** 0.75
    colours = theme(dark)
    # A hundredth of a pixel more, since matplotlib rounds the number of pixels downwards.
    inches = ((width + 0.01) / (72 * zoom), (height + 0.01) / (72 * zoom))
    figure = Figure(figsize=inches, dpi=72 * zoom, facecolor=colours.background)
    return Canvas(figure, colours, width / zoom, height / zoom)


def notice(text: str, size: tuple[int, int], dark: bool = False) -> Image.Image:
    """Draw an image that says in words why there is no chart."""
    canvas = new_canvas(size, dark)
    columns = int(canvas.width / (HEADING_SIZE * _CHARACTER_WIDTH)) - 4  # characters
    lines = [line for paragraph in text.splitlines() for line in wrap(paragraph, columns)]
    canvas.figure.text(
        0.5,
        0.5,
        "\n".join(lines),
        fontsize=HEADING_SIZE,
        color=canvas.theme.ink,
        ha="center",
        va="center",
        linespacing=1.5,
        parse_math=False,
    )
    return canvas.draw()


def text_width(text: str, font_size: float = FONT_SIZE) -> float:
    """Estimate the width of a text in points."""
    return len(text) * font_size * _CHARACTER_WIDTH


def shorten(text: str, width: float, font_size: float = FONT_SIZE) -> str:
    """Shorten a text from its start to a width in points: layer names differ at the end."""
    room = max(2, int(width / (font_size * _CHARACTER_WIDTH)))
    return text if len(text) <= room else f"…{text[len(text) - room + 1 :]}"


def tick_indices(count: int, room: float, each: float) -> list[int]:
    """Return evenly spaced indices below `count`, so that labels `each` wide fit into `room`; 0 is among them."""
    if count == 0:
        return []
    step = max(1, math.ceil(int(count * each) / max(1, int(room))))
    return list(range(0, count, step))


def to_batch(images: Sequence[Image.Image]) -> Tensor:
    """Stack images of one size to ComfyUI's IMAGE: (count, height, width, 3), float32, 0 to 1."""
    arrays = [np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0 for image in images]
    return torch.from_numpy(np.stack(arrays))
