"""A sheet of small pictures with their captions: what a training will see, or draws, at one glance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

COLUMNS = 4  # at most


CELL = 192  # pixels, where a row is full; a node shows the sheet at about half its size


GAP = 12


TEXT = 15  # letter height in pixels


LINE = 20  # distance of text lines


_PAPER, _INK = "#ffffff", "#202020"


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def contact_sheet(pictures: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
    """Draw pictures (each float (H, W, 3) in 0..1) in rows of four, two lines of caption under each.

    Fewer than four fill the width of the sheet between them. Returns float32 (H, W, 3) in 0..1.
    """
    if len(pictures) != len(captions):
        given = f"{len(pictures)} and {len(captions)}"
        raise ValueError(f"A contact sheet needs a caption for each picture: {given} given.")
    font = _font()
    width = GAP + COLUMNS * (CELL + GAP)
    columns = min(COLUMNS, max(1, len(pictures)))
    cell = (width - GAP) // columns - GAP
    rows = -(-len(pictures) // columns)
    row_height = cell + 2 * LINE + GAP
    sheet = Image.new("RGB", (width, GAP + rows * row_height + GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left = GAP + index % columns * (cell + GAP)
        top = GAP + index // columns * row_height
        small = _thumbnail(picture, cell)
        sheet.paste(small, (left + (cell - small.width) // 2, top + (cell - small.height) // 2))
        draw.rectangle((left, top, left + cell - 1, top + cell - 1), outline="#d0d0d0")
        for number, line in enumerate(_shorten(_wrap(caption, cell, font), 2)):
            draw.text((left, top + cell + 2 + number * LINE), line, fill=_INK, font=font)
    return torch.from_numpy(np.asarray(sheet, dtype=np.float32) / 255.0)


def _thumbnail(picture: Tensor, side: int) -> Image.Image:
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return ImageOps.contain(Image.fromarray(pixels), (side, side), Image.Resampling.LANCZOS)


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
