"""Sheet of images of several steps: a row for each step, a column for each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .canvas import theme
from .contact_sheet import FONT_SIZE, GAP, LINE_HEIGHT, thumbnail
from .labels import shorten, wrap, write

_LABEL_WIDTH = 136  # pixels, of the column on the left of each block
_CELL_SIZES = 128, 256  # smallest and largest side of a cell
_CAPTION_LINES = 3
# Of the rows that stand out: light, dark.
_MARK = {False: "#c2560c", True: "#ffa050"}
_MARKED_BACKGROUND = {False: "#fdf0e4", True: "#402c1a"}


@dataclass(frozen=True, eq=False)
class SheetRow:
    """A row of the sheet."""

    label: str
    images: Sequence[Tensor]  # each (height, width, 3), floating point, 0 to 1; one for each prompt, or none
    remark: str = ""  # below the label, which is faint without one
    strong: bool = False  # whether the row stands out


def step_sheet(rows: Sequence[SheetRow], prompts: Sequence[str], dark: bool = False) -> Tensor:
    """Draw the rows below each other, with the prompts above the columns; many rows fill several blocks side by side.

    Args:
        rows: from the first step to the last.
        prompts: what the images of each row show.
        dark: light letters on a dark background.

    Returns:
        The sheet: (height, width, 3), float32, 0 to 1.

    Raises:
        ValueError: there are no images, or a row has another number of images than there are prompts.
    """
    for row in rows:
        if row.images and len(row.images) != len(prompts):
            raise ValueError(f"Row '{row.label}' has {len(row.images)} images for {len(prompts)} prompts.")
    sides = [max(image.shape[:2]) for row in rows for image in row.images]
    if not sides:
        raise ValueError("A sheet of steps needs images, and there are none.")
    cell = min(max(_CELL_SIZES[0], *sides), _CELL_SIZES[1])
    captions = [shorten(wrap(prompt, cell, FONT_SIZE), _CAPTION_LINES) for prompt in prompts]
    top = GAP + max(map(len, captions)) * LINE_HEIGHT + GAP // 2
    width = _LABEL_WIDTH + len(prompts) * (cell + GAP)
    blocks = max(1, round((len(rows) * (cell + GAP) / width) ** 0.5))  # so that the sheet is not much taller than wide
    per_block = -(-len(rows) // blocks)
    sheet = Image.new("RGB", (blocks * width, top + per_block * (cell + GAP)), theme(dark).background)
    draw = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        left, place = number // per_block * width, number % per_block
        if place == 0:
            for column, lines in enumerate(captions):
                _write(draw, (left + _LABEL_WIDTH + column * (cell + GAP), GAP), lines, theme(dark).ink)
        box = (left, top + place * (cell + GAP), left + width, top + (place + 1) * (cell + GAP))
        _draw_row(sheet, row, box, cell, dark)
    return torch.from_numpy(np.asarray(sheet, dtype=np.float32) / 255.0)


def _draw_row(sheet: Image.Image, row: SheetRow, box: tuple[int, int, int, int], cell: int, dark: bool) -> None:
    """Draw a row into a box: left, top, right, bottom. cell: the side of an image."""
    start, top, end, bottom = box
    draw, colours = ImageDraw.Draw(sheet), theme(dark)
    frame = _MARK[dark] if row.strong else colours.grid
    if row.strong:
        draw.rectangle((start, top - GAP // 2, end, bottom - GAP // 2 - 1), fill=_MARKED_BACKGROUND[dark])
    label, remark = (list(wrap(text, _LABEL_WIDTH - 2 * GAP, FONT_SIZE)) for text in (row.label, row.remark))
    _write(draw, (start + GAP, top), label, colours.ink if row.remark else colours.faint)
    _write(draw, (start + GAP, top + len(label) * LINE_HEIGHT), remark, _MARK[dark])
    if not row.images:
        _write(draw, (start + _LABEL_WIDTH, top), ["no images were drawn"], colours.ink)
    for column, image in enumerate(row.images):
        left = start + _LABEL_WIDTH + column * (cell + GAP)
        small = thumbnail(image, cell)
        sheet.paste(small, (left + (cell - small.width) // 2, top + (cell - small.height) // 2))
        draw.rectangle((left, top, left + cell - 1, top + cell - 1), outline=frame)


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], lines: Sequence[str], ink: str) -> None:
    left, top = place
    for number, line in enumerate(lines):
        write(draw, (left, top + number * LINE_HEIGHT), line, ink, FONT_SIZE)
