"""Draw the pack's icon and banner for the registry: assets/registry/icon.png and banner.png.

    python -m tools.registry_images

Both show the spectrum of a layer: the singular values that are signal in colour, the noise that is truncated in grey.
The banner adds images of the quickstart, from the README's.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "assets" / "registry"
IMAGES = ROOT / "docs" / "images" / "quickstart.webp"  # six before, and six after

ICON = 400  # pixels; the registry takes up to 800 × 400
BANNER = (1260, 540)  # 21:9
FINER = 4  # drawn larger by this factor, so that edges are smooth
GROUND, LIGHT, QUIET = "#17181f", "#f4f4f6", "#9a9cab"
FIRST, LAST, NOISE = (255, 176, 32), (214, 51, 132), (74, 76, 92)  # the signal's colours, the noise's grey
SIGNAL, BARS = 5, 8
TILE, PITCH, TOP, HALVES = 128, 132, 34, (0, 416)  # of these, in pixels
SHOWN = ((1, 0), (2, 0), (1, 1))  # column and row of castle, cat face and house


def spectrum(draw: ImageDraw.ImageDraw, left: float, top: float, width: float, height: float) -> None:
    """Draw falling bars into a box, the first of them in colour."""
    gap = width / (BARS * 3.2)
    wide = (width - gap * (BARS - 1)) / BARS
    for number in range(BARS):
        tall = height * (0.66**number if number < SIGNAL else 0.11 - 0.012 * (number - SIGNAL))
        share = number / (SIGNAL - 1)
        mixed = tuple(round(a + (b - a) * share) for a, b in zip(FIRST, LAST, strict=True))
        x = left + number * (wide + gap)
        box = (x, top + height - tall, x + wide, top + height)
        draw.rounded_rectangle(box, radius=wide * 0.3, fill=mixed if number < SIGNAL else NOISE)


def icon() -> Image.Image:
    """Return the square icon."""
    size = ICON * FINER
    image = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle((0, 0, size - 1, size - 1), radius=size * 0.2, fill=GROUND)
    spectrum(draw, size * 0.16, size * 0.2, size * 0.68, size * 0.6)
    return image.resize((ICON, ICON), Image.Resampling.LANCZOS)


def banner() -> Image.Image:
    """Return the banner: name and spectrum on the left, images before and after learning a style on the right."""
    width, height = BANNER
    large = Image.new("RGB", (width * FINER, height * FINER), GROUND)
    draw = ImageDraw.Draw(large)

    def text(x: float, y: float, words: str, size: float, colour: str) -> None:
        draw.text((x * FINER, y * FINER), words, colour, ImageFont.load_default(size * FINER))

    text(64, 60, "AC-LoRA", 92, LIGHT)
    text(68, 176, "10 to 30 images become a style.", 31, LIGHT)
    text(68, 218, "Length and ranks set themselves.", 31, QUIET)
    spectrum(draw, 68 * FINER, 300 * FINER, 440 * FINER, 176 * FINER)
    image = large.resize(BANNER, Image.Resampling.LANCZOS)
    side, gap, left = 196, 14, 586
    with Image.open(IMAGES) as images:
        for row, half in enumerate(HALVES):
            for number, (across, down) in enumerate(SHOWN):
                x, y = half + across * PITCH, TOP + down * PITCH
                tile = images.convert("RGB").crop((x, y, x + TILE, y + TILE))
                place = (left + number * (side + gap), 67 + row * (side + gap))
                image.paste(tile.resize((side, side), Image.Resampling.LANCZOS), place, _rounded(side))
    return image


def _rounded(side: int) -> Image.Image:
    """Return a mask of a square with rounded corners."""
    mask = Image.new("L", (side * FINER, side * FINER), 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, side * FINER - 1, side * FINER - 1), radius=18 * FINER, fill=255)
    return mask.resize((side, side), Image.Resampling.LANCZOS)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, image in (("icon", icon()), ("banner", banner())):
        path = FOLDER / f"{name}.png"
        image.save(path, optimize=True)
        print(f"{path.relative_to(ROOT)}: {image.width} × {image.height}, {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
