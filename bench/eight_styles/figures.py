"""The figure: what several lines of the study draw for the same prompts, row by row, style by style."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from bench.eight_styles.scores import Cell
from bench.pool import Row

MOST_BYTES = 700_000
COLUMNS = 8  # images of a row, unless asked for otherwise
GAP, MARGIN = 3, 10  # pixels
LABEL_SIZE, HEADING_SIZE, PROMPT_SIZE = 15, 20, 12  # of the letters, pixels
_LONGEST_LABEL = 230  # pixels; longer labels are wrapped
_TIE = "\N{NO-BREAK SPACE}"  # keeps words on one line; the font lacks it, so a space is drawn
_INK, _FAINT, _BACKGROUND = "#202020", "#6a6a6a", "#ffffff"

Strips = Mapping[tuple[str, Cell], Image.Image]  # images side by side, by style and cell
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Text:
    """Lines of text with their place.

    box: left, top, right, bottom in pixels; the lines fit into it.
    """

    lines: tuple[str, ...]
    size: int
    box: tuple[int, int, int, int]
    faint: bool = False


@dataclass(frozen=True)
class Layout:
    """Where everything of a figure goes: texts, and images by the position of their top left corner."""

    size: tuple[int, int]
    texts: list[Text]
    images: list[tuple[Image.Image, tuple[int, int]]]


def strips(rows: Iterable[Row]) -> dict[tuple[str, Cell], Image.Image]:
    """Decode the drawn images of a result file, which seed 0 has.

    Raises:
        ValueError: there are none, as in a file that was written without images.
    """
    found = {}
    for row in rows:
        for step, cell in row.get("cells", {}).items():
            if "images" in cell:
                data = io.BytesIO(base64.b64decode(cell["images"]))
                found[row["style"], Cell(row["name"], step)] = Image.open(data).convert("RGB")
    if not found:
        raise ValueError(
            "The result files have no images. A figure needs those that a run has written, not a small copy."
        )
    return found


def comparison(
    drawn: Strips,
    styles: Sequence[str],
    cells: Sequence[Cell],
    prompts: Mapping[str, Sequence[str]] | None = None,
    columns: int = COLUMNS,
) -> Image.Image:
    """Draw a row of images for each cell, below a heading for each style.

    Args:
        drawn: from `strips`.
        styles: in the order in which they are shown.
        cells: the rows of each style; cells without images in a style have no row there.
        prompts: of the images by style, written above them; none by default.
        columns: images of a row; fewer where a strip has fewer.

    Raises:
        ValueError: no style has images of any of the cells.
    """
    return _draw(layout(drawn, styles, cells, prompts, columns))


def save(image: Image.Image, path: Path) -> None:
    """Write an image as its suffix says, below 700 kB where the format allows: WEBP in the best quality that fits.

    Raises:
        ValueError: the image does not fit.
    """
    lossy = path.suffix.lower() in (".webp", ".jpg", ".jpeg")
    path.parent.mkdir(parents=True, exist_ok=True)
    for quality in (90, 80, 70, 60, 50) if lossy else (None,):
        image.save(path, **({"optimize": True} if quality is None else {"quality": quality}))
        if path.stat().st_size <= MOST_BYTES:
            return
    size = path.stat().st_size
    path.unlink()
    raise ValueError(f"{path} would have {size / 1e3:.0f} kB. Choose fewer styles or lines, or the suffix .webp.")


# --- layout ---


def layout(
    drawn: Strips,
    styles: Sequence[str],
    cells: Sequence[Cell],
    prompts: Mapping[str, Sequence[str]] | None = None,
    columns: int = COLUMNS,
) -> Layout:
    """Return where the texts and images of `comparison` go; see there for arguments."""
    shown = {style: [cell for cell in cells if (style, cell) in drawn] for style in styles}
    shown = {style: rows for style, rows in shown.items() if rows}
    if not shown:
        raise ValueError(
            f"None of the lines has images in any of the styles. Lines: {'; '.join(map(str, cells)) or 'none'}. "
            f"Styles: {', '.join(styles) or 'none'}; there are: {', '.join(sorted({style for style, _ in drawn}))}."
        )
    first = next(drawn[style, rows[0]] for style, rows in shown.items())
    columns = min(columns, first.width // first.height)
    page = _Page(first.height, columns, _label_width([_label(cell) for rows in shown.values() for cell in rows]))
    for style, rows in shown.items():
        page.heading(style)
        page.prompts(list((prompts or {}).get(style, ()))[:columns])
        for cell in rows:
            page.row(_label(cell), drawn[style, cell])
    return page.layout()


class _Page:
    """Adds headings, prompts and rows from top to bottom.

    side: width and height of an image. label_width: of the column of labels.
    """

    def __init__(self, side: int, columns: int, label_width: int) -> None:
        self.side, self.columns, self.label_width = side, columns, label_width
        self.left = MARGIN + label_width + MARGIN  # of the images
        self.width = self.left + columns * (side + GAP) - GAP + MARGIN
        self.top = MARGIN
        self.texts: list[Text] = []
        self.images: list[tuple[Image.Image, tuple[int, int]]] = []

    def heading(self, text: str) -> None:
        if self.images:
            self.top += 2 * MARGIN
        lines = wrapped(text, HEADING_SIZE, self.width - 2 * MARGIN)
        bottom = self.top + _height(lines, HEADING_SIZE)
        self.texts.append(Text(lines, HEADING_SIZE, (MARGIN, self.top, self.width - MARGIN, bottom)))
        self.top = bottom + MARGIN // 2

    def prompts(self, prompts: Sequence[str]) -> None:
        texts = [wrapped(prompt, PROMPT_SIZE, self.side - GAP) for prompt in prompts]
        height = max((_height(lines, PROMPT_SIZE) for lines in texts), default=0)
        for number, lines in enumerate(texts):
            left = self.left + number * (self.side + GAP)
            top = self.top + height - _height(lines, PROMPT_SIZE)  # all end just above their images
            box = (left, top, left + self.side - GAP, self.top + height)
            self.texts.append(Text(lines, PROMPT_SIZE, box, faint=True))
        self.top += height + (MARGIN // 2 if texts else 0)

    def row(self, label: str, strip: Image.Image) -> None:
        lines = wrapped(label, LABEL_SIZE, self.label_width)
        height = _height(lines, LABEL_SIZE)
        row_height = max(self.side, height)
        top = self.top + (row_height - height) // 2
        self.texts.append(Text(lines, LABEL_SIZE, (MARGIN, top, MARGIN + self.label_width, top + height)))
        for number in range(min(self.columns, strip.width // strip.height)):
            image = strip.crop((number * strip.height, 0, (number + 1) * strip.height, strip.height))
            self.images.append(
                (image.resize((self.side, self.side)), (self.left + number * (self.side + GAP), self.top))
            )
        self.top += row_height + GAP

    def layout(self) -> Layout:
        return Layout((self.width, self.top - GAP + MARGIN), self.texts, self.images)


def _label(cell: Cell) -> str:
    return str(cell).replace(" steps", f"{_TIE}steps")


def _label_width(labels: Sequence[str]) -> int:
    """Return the width of the longest label after wrapping."""
    font = _font(LABEL_SIZE)
    lines = [line for label in labels for line in wrapped(label, LABEL_SIZE, _LONGEST_LABEL)]
    return max(int(font.getlength(line)) + 1 for line in lines)


def wrapped(text: str, size: int, width: int) -> tuple[str, ...]:
    """Split a text at spaces, except non-breaking ones, into lines of a width; a word that is too wide is broken.

    Args:
        size: of the letters, in pixels.
        width: of the lines, in pixels.
    """
    font, lines = _font(size), [""]
    for word in (part.replace(_TIE, " ") for part in text.split(" ")):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        pieces = _broken(word, font, width)
        lines += pieces if lines[-1] else []
        if not lines[0]:
            lines = pieces
    return tuple(lines)


def _broken(word: str, font: Font, width: int) -> list[str]:
    pieces = [""]
    for letter in word:
        if pieces[-1] and font.getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def _height(lines: Sequence[str], size: int) -> int:
    return len(lines) * _line_height(size)


def _line_height(size: int) -> int:
    return round(1.3 * size)


def _font(size: int) -> Font:
    return ImageFont.load_default(size)


def _draw(found: Layout) -> Image.Image:
    page = Image.new("RGB", found.size, _BACKGROUND)
    draw = ImageDraw.Draw(page)
    for image, position in found.images:
        page.paste(image, position)
    for text in found.texts:
        left, top, _, _ = text.box
        for number, line in enumerate(text.lines):
            place = (left, top + number * _line_height(text.size))
            draw.text(place, line, fill=_FAINT if text.faint else _INK, font=_font(text.size))
    return page
