"""Compose squares of tiles with headings, as the template browser shows them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

TILE, GAP = 128, 4  # pixels of an image, and between two images, in what the workflows save
HEADING = 34  # pixels above each row
SIDE = 600  # pixels of a thumbnail
PAPER, INK = "white", "#202020"


def newest(folder: Path, name: str, back: int = 0) -> Image.Image:
    """Return the last image that a workflow saved under a name, or the one `back` before it."""
    files = sorted(folder.glob(f"{name}_*.png"))
    if len(files) <= back:
        wanted = f"{name}_*.png" if back == 0 else f"{back + 1} images {name}_*.png"
        raise SystemExit(f"{folder} has no {wanted}. Run the workflow first.")
    return Image.open(files[-1 - back]).convert("RGB")


def tiles(grid: Image.Image, columns: int = 3, rows: int = 2) -> list[Image.Image]:
    """Cut a grid of images, as ComfyUI's Image Grid makes it, into its images."""
    places = [(column * (TILE + GAP), row * (TILE + GAP)) for row in range(rows) for column in range(columns)]
    return [grid.crop((x, y, x + TILE, y + TILE)) for x, y in places]


def in_rows(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Place images of one size in rows."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (TILE + GAP) - GAP, rows * (TILE + GAP) - GAP), PAPER)
    for place, image in enumerate(images):
        sheet.paste(image, (place % columns * (TILE + GAP), place // columns * (TILE + GAP)))
    return sheet


def stacked(rows: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Stack images vertically, each under its heading."""
    width, height = max(image.width for _, image in rows), sum(image.height + HEADING for _, image in rows)
    sheet = Image.new("RGB", (width, height), PAPER)
    draw, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(24), 0
    for words, image in rows:
        draw.text((4, top + 3), words, INK, font)
        sheet.paste(image, ((width - image.width) // 2, top + HEADING))
        top += HEADING + image.height
    return sheet


def side_by_side(columns: Sequence[Image.Image], gap: int = 24) -> Image.Image:
    """Place images next to each other, with white between them."""
    width = sum(image.width for image in columns) + gap * (len(columns) - 1)
    sheet, left = Image.new("RGB", (width, max(image.height for image in columns)), PAPER), 0
    for image in columns:
        sheet.paste(image, (left, 0))
        left += image.width + gap
    return sheet


def square(image: Image.Image, margin: int = 14) -> Image.Image:
    """Return a white square with the image in its middle, as large as it fits."""
    side = max(image.size) + 2 * margin
    sheet = Image.new("RGB", (side, side), PAPER)
    sheet.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return sheet.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
