"""The picture of a training: what it came to in words, its chart, and the images drawn with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from PIL import Image, ImageDraw
from torch import Tensor

from ...adapter import Restart
from .canvas import Theme, theme
from .contact_sheet import thumbnail
from .labels import shorten, wrap, write
from .training import training_chart

# A node of ComfyUI is some 400 wide, so it shows the picture at half its size: letters are twice as large for it.
WIDTH, CHART_HEIGHT = 768, 460  # pixels
ZOOM = 2.0  # pixels of a point in the chart
FONT_SIZE = 21  # pixels

_LINE_HEIGHT = 28
_MARGIN, _GAP = 16, 12
_MAX_COLUMNS = 4
_TEXT_LINES, _CAPTION_LINES = 16, 2


class Trajectory(Protocol):
    """What was measured at the steps of a training, as its report has it and its progress; see `training_chart`."""

    @property
    def losses(self) -> Sequence[float]:
        """Of each step."""

    @property
    def restarts(self) -> Sequence[Restart]:
        """In their order."""

    @property
    def validation(self) -> Sequence[tuple[int, float]]:
        """Step and loss of held-out images."""

    @property
    def fit(self) -> Sequence[tuple[int, float]]:
        """Step and loss of training images at fixed noise."""


def training_picture(
    trajectory: Trajectory,
    total_steps: int,
    images: Sequence[Tensor] = (),
    captions: Sequence[str] = (),
    title: str = "",
    summary: str = "",
    dark: bool = False,
) -> Image.Image:
    """Draw a summary above the chart of a training, and images with their captions below it.

    Args:
        trajectory: of the steps so far.
        total_steps: planned, the length of the chart's axis.
        images: (height, width, 3), floating point, 0 to 1; the last ones that were drawn, if any.
        captions: one for each image.
        title: a line above the images.
        summary: sentences; none while a training runs.
        dark: light letters on a dark background.

    Raises:
        ValueError: the numbers of images and captions differ.
    """
    if len(images) != len(captions):
        raise ValueError(f"The picture needs a caption for each image: {len(images)} and {len(captions)} given.")
    parts = [_text(summary, theme(dark))] if summary else []
    chart_size = WIDTH, CHART_HEIGHT
    measured = trajectory.restarts, trajectory.validation
    parts.append(training_chart(trajectory.losses, total_steps, *measured, chart_size, dark, trajectory.fit, ZOOM))
    if images:
        if title:
            parts.append(_text(title, theme(dark), 0))
        parts.append(_images(images, captions, theme(dark)))
    picture = Image.new("RGB", (WIDTH, sum(part.height for part in parts)), theme(dark).background)
    top = 0
    for part in parts:
        picture.paste(part, (0, top))
        top += part.height
    return picture


def _text(text: str, colours: Theme, gap: int = _GAP) -> Image.Image:
    lines = shorten(wrap(text, WIDTH - 2 * _MARGIN, FONT_SIZE), _TEXT_LINES)
    part = Image.new("RGB", (WIDTH, 2 * gap + len(lines) * _LINE_HEIGHT), colours.background)
    _write(part, (_MARGIN, gap), lines, colours)
    return part


def _images(images: Sequence[Tensor], captions: Sequence[str], colours: Theme) -> Image.Image:
    """Draw the images in rows of equal length, as far as possible."""
    rows = -(-len(images) // _MAX_COLUMNS)
    columns = -(-len(images) // rows)
    cell = (WIDTH - 2 * _MARGIN - (columns - 1) * _GAP) // columns
    cell = min(cell, WIDTH // 2)
    texts = [shorten(wrap(caption, cell, FONT_SIZE), _CAPTION_LINES) for caption in captions]
    row_height = cell + max(map(len, texts)) * _LINE_HEIGHT + _GAP
    part = Image.new("RGB", (WIDTH, rows * row_height + _GAP), colours.background)
    for index, (image, lines) in enumerate(zip(images, texts, strict=True)):
        left = _MARGIN + index % columns * (cell + _GAP)
        top = index // columns * row_height
        small = thumbnail(image, cell)
        part.paste(small, (left + (cell - small.width) // 2, top + (cell - small.height) // 2))
        _write(part, (left, top + cell + 2), lines, colours)
    return part


def _write(part: Image.Image, place: tuple[int, int], lines: Sequence[str], colours: Theme) -> None:
    left, top = place
    draw = ImageDraw.Draw(part)
    for number, line in enumerate(lines):
        write(draw, (left, top + number * _LINE_HEIGHT), line, colours.ink, FONT_SIZE)
