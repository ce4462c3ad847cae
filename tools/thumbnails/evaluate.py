"""Make workflows/evaluate.jpg, the workflow's thumbnail, from the image that the workflow saved.

python -m tools.thumbnails.evaluate OUTPUT_FOLDER        # the folder with nearest_*.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from tools.thumbnails.sheet import newest, save_thumbnail, stacked

WIDTH = 1100  # pixels
SHARE = 0.5  # of the image's height, from the top: whole rows, as there are an even number


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.thumbnails.evaluate", description=__doc__)
    parser.add_argument("folder", type=Path)
    whole = newest(parser.parse_args().folder, "nearest", "evaluate")
    upper = whole.crop((0, 0, whole.width, round(whole.height * SHARE)))
    small = upper.resize((WIDTH, round(upper.height * WIDTH / upper.width)), Image.Resampling.LANCZOS)
    save_thumbnail(stacked([("Drawn, nearest training image, nearest real image", small)]), "evaluate")


if __name__ == "__main__":
    main()
