"""Contact sheet: small images with their captions, for a dataset or for previews."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from ...storage import to_pil
from .canvas import theme
from .labels import shorten, wrap, write

COLUMNS = 4  # at most
CELL_SIZE = 192  # pixels of a cell in a full row; a node shows the sheet at about half its size
GAP = 12
FONT_SIZE = 15  # pixels
LINE_HEIGHT = 20  # pixels
_CAPTION_LINES, _NOTE_LINES = 2, 2  # at most
_WIDTH = GAP + COLUMNS * (CELL_SIZE + GAP)
_NOTE_INK = {False: "#8a4b08", True: "#f0b060"}  # light, dark


def contact_sheet(
    images: Sequence[Tensor],
    captions: Sequence[str],
    columns: int = COLUMNS,
    notes: Sequence[str] = (),
    dark: bool = False,
) -> Tensor:
    """Draw images in rows, with two lines of caption under each; fewer than four in a row fill the width.

    Args:
        images: (height, width, channels) with 1 to 4 channels, floating point, 0 to 1.
        captions: one for each image.
        columns: images in a row, at most four.
        notes: one for each image, below its caption, or none at all.
        dark: light letters on a dark background.

    Returns:
        The sheet: (height, width, 3), float32, 0 to 1. Its last row of pixels is background.

    Raises:
        ValueError: the numbers of images and captions, or notes, differ.
    """
    if len(images) != len(captions):
        given = f"{len(images)} and {len(captions)}"
        raise ValueError(f"A contact sheet needs a caption for each image: {given} given.")
    colours = theme(dark)
    columns = min(columns, max(1, len(images)))
    cell = cell_side(columns)
    own_notes = [shorten(wrap(note, cell, FONT_SIZE), _NOTE_LINES) for note in notes or [""] * len(images)]
    row_height = cell + GAP + (_CAPTION_LINES + max(map(len, own_notes), default=0)) * LINE_HEIGHT
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (_WIDTH, GAP + rows * row_height + GAP), colours.background)
    draw = ImageDraw.Draw(sheet)
    for index, (image, caption, note) in enumerate(zip(images, captions, own_notes, strict=True)):
        left = GAP + index % columns * (cell + GAP)
        top = GAP + index // columns * row_height
        small = thumbnail(image, cell)
        sheet.paste(small, (left + (cell - small.width) // 2, top + (cell - small.height) // 2))
        draw.rectangle((left, top, left + cell - 1, top + cell - 1), outline=colours.grid)
        written = shorten(wrap(caption, cell, FONT_SIZE), _CAPTION_LINES)
        lines = [(line, colours.ink) for line in written] + [(line, _NOTE_INK[dark]) for line in note]
        for number, (line, ink) in enumerate(lines):
            write(draw, (left, top + cell + 2 + number * LINE_HEIGHT), line, ink, FONT_SIZE)
    return torch.from_numpy(np.asarray(sheet, dtype=np.float32) / 255.0)


def extend(sheet: Tensor, height: int) -> Tensor:
    """Return a contact sheet, (height, width, 3), with background added below it up to a height in pixels."""
    return torch.cat([sheet, sheet[-1:].expand(height - sheet.shape[0], -1, -1)])


def cell_side(columns: int) -> int:
    """Return the side of an image's cell in pixels, where there are so many images in a row."""
    return (_WIDTH - GAP) // min(COLUMNS, max(1, columns)) - GAP


def thumbnail(image: Tensor, side: int) -> Image.Image:
    """Return an image, (height, width, channels) in 0 to 1, scaled to fit into a square."""
    return ImageOps.contain(to_pil(image), (side, side), Image.Resampling.LANCZOS)
