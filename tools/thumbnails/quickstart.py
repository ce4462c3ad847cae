"""Make workflows/quickstart.jpg, the workflow's thumbnail and the README's image, from the quickstart's images.

python -m tools.thumbnails.quickstart OUTPUT_FOLDER        # the folder with before_*.png and after_*.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tools.thumbnails.sheet import newest, save_thumbnail, stacked


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.thumbnails.quickstart", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    before, after = (newest(folder, name, "quickstart") for name in ("before", "after"))
    save_thumbnail(stacked([("Before", before), ("After learning a style from 16 images", after)]), "quickstart")


if __name__ == "__main__":
    main()
