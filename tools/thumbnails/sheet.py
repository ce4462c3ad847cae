"""Compose the workflows' thumbnails from rows of images with headings."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
HEADING = 34  # pixels above each row


def newest(folder: Path, name: str, workflow: str, back: int = 0) -> Image.Image:
    """Return the last image that a workflow saved under a name, or the one `back` before it."""
    files = sorted(folder.glob(f"{name}_*.png"))
    if len(files) <= back:
        wanted = f"{name}_*.png" if back == 0 else f"{back + 1} images {name}_*.png"
        raise SystemExit(f"{folder} has no {wanted}. Run workflows/{workflow}.json first.")
    return Image.open(files[-1 - back]).convert("RGB")


def stacked(rows: list[tuple[str, Image.Image]]) -> Image.Image:
    """Stack images vertically, each under its heading unless that is empty."""
    height = sum(image.height + (HEADING if words else 0) for words, image in rows)
    sheet = Image.new("RGB", (max(image.width for _, image in rows), height), "white")
    draw, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(20), 0
    for words, image in rows:
        if words:
            draw.text((8, top + 5), words, "black", font)
            top += HEADING
        sheet.paste(image, (0, top))
        top += image.height
    return sheet


def side_by_side(images: list[Image.Image], gap: int = 0) -> Image.Image:
    """Place images next to each other. gap: white pixels between them."""
    width = sum(image.width for image in images) + gap * (len(images) - 1)
    sheet, left = Image.new("RGB", (width, max(image.height for image in images)), "white"), 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width + gap
    return sheet


def save_thumbnail(sheet: Image.Image, workflow: str) -> None:
    """Save a thumbnail beside its workflow."""
    target = WORKFLOWS / f"{workflow}.jpg"
    sheet.save(target, quality=92)
    print(f"{target.name}: {sheet.width} × {sheet.height}")
