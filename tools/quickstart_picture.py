"""Makes workflows/quickstart.jpg, the workflow's thumbnail and the README's picture, from what a quickstart drew.

    python -m tools.quickstart_picture OUTPUT_FOLDER        # the folder with before_*.png and after_*.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

TARGET = Path(__file__).resolve().parents[1] / "workflows" / "quickstart.jpg"
HEADING = 34  # pixels above each row


def newest(folder: Path, name: str) -> Image.Image:
    """The last picture that the quickstart saved under a name."""
    files = sorted(folder.glob(f"{name}_*.png"))
    if not files:
        raise SystemExit(f"{folder} has no {name}_*.png. Run `python3 run.py quickstart` first.")
    return Image.open(files[-1]).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.quickstart_picture", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    before, after = newest(folder, "before"), newest(folder, "after")
    picture = Image.new("RGB", (before.width, 2 * (before.height + HEADING)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(20)
    for row, (words, part) in enumerate((("Before", before), ("After learning a style from 16 pictures", after))):
        top = row * (before.height + HEADING)
        draw.text((8, top + 5), words, "black", font)
        picture.paste(part, (0, top + HEADING))
    picture.save(TARGET, quality=92)
    print(f"{TARGET.name}: {picture.width} × {picture.height}")


if __name__ == "__main__":
    main()
