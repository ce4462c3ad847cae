"""A sheet of small pictures with their captions and a few lines below: what a training will see, at one glance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

COLUMNS = 4
CELL = 192  # pixels; a node shows the sheet at about half its size
GAP = 12
TEXT = 15  # letter height in pixels
LINE = 20  # distance of text lines
_PAPER, _INK = "#ffffff", "#202020"

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def contact_sheet(pictures: Sequence[Tensor], captions: Sequence[str], notes: Sequence[str]) -> Tensor:
    """Draw pictures (each float (H, W, 3) in 0..1) in rows of four, two lines of caption under each, notes below.

    Returns float32 (H, W, 3) in 0..1.
    """
    if len(pictures) != len(captions):
        given = f"{len(pictures)} and {len(captions)}"
        raise ValueError(f"A contact sheet needs a caption for each picture: {given} given.")
    font = _font()
    width = GAP + COLUMNS * (CELL + GAP)
    rows = -(-len(pictures) // COLUMNS)
    row_height = CELL + 2 * LINE + GAP
    lines = [line for note in notes for line in _wrap(note, width - 2 * GAP, font)]
    sheet = Image.new("RGB", (width, GAP + rows * row_height + len(lines) * LINE + GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left = GAP + index % COLUMNS * (CELL + GAP)
        top = GAP + index // COLUMNS * row_height
        small = _thumbnail(picture)
        sheet.paste(small, (left + (CELL - small.width) // 2, top + (CELL - small.height) // 2))
        draw.rectangle((left, top, left + CELL - 1, top + CELL - 1), outline="#d0d0d0")
        for number, line in enumerate(_shorten(_wrap(caption, CELL, font), 2)):
            draw.text((left, top + CELL + 2 + number * LINE), line, fill=_INK, font=font)
    for number, line in enumerate(lines):
        draw.text((GAP, GAP + rows * row_height + number * LINE), line, fill=_INK, font=font)
    return torch.from_numpy(np.asarray(sheet, dtype=np.float32) / 255.0)


def _thumbnail(picture: Tensor) -> Image.Image:
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return ImageOps.contain(Image.fromarray(pixels), (CELL, CELL), Image.Resampling.LANCZOS)


def _font() -> Font:
    """DejaVu from matplotlib knows Greek, Cyrillic and more, which Pillow's own font does not."""
    import matplotlib

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(str(path), TEXT) if path.is_file() else ImageFont.load_default(TEXT)


def _wrap(text: str, width: int, font: Font) -> list[str]:
    """Split at spaces into lines that fit; a word that alone is too wide is cut to what fits."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        longer = f"{line} {word}" if line else word
        if font.getlength(longer) <= width:
            line = longer
            continue
        lines += [line] if line else []
        while font.getlength(word) > width:
            fits = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            lines.append(word[:fits])
            word = word[fits:]
        line = word
    return lines + [line] if line else lines


def _shorten(lines: list[str], count: int) -> list[str]:
    return lines if len(lines) <= count else [*lines[: count - 1], lines[count - 1][:-2] + "…"]
