"""Makes workflows/resume.jpg and workflows/compare_ranks.jpg, their thumbnails, from what these workflows drew.

    python -m tools.thumbnails.resume_and_compare resume OUTPUT_FOLDER
    python -m tools.thumbnails.resume_and_compare compare_ranks OUTPUT_FOLDER LORAS

resume: cancelled once on the way, then run to its end. LORAS: the folder with compare_*.safetensors.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from aclora_core.adapter import lora_file as adapter_file
from aclora_core.inspection.charts.overview import inspection_charts
from aclora_core.inspection.measure import inspect_lora
from aclora_core.text import size_text
from tools.thumbnails.sheet import newest, save_thumbnail, side_by_side, stacked

WAYS = {"rank_2": "A plain LoRA of rank 2", "rank_32": "A plain LoRA of rank 32", "ac": "AC-LoRA, rank 32 at most"}


def resume(images: Path) -> Image.Image:
    """What was learned up to the cancel, and at the end."""
    cancelled, end = (newest(images, "resume", "resume", back) for back in (1, 0))
    return stacked([("Cancelled on the way", cancelled), ("Run again: it went on to its end", end)])


def compare_ranks(images: Path, loras: Path) -> Image.Image:
    """A column for each way to a rank: the size of its file, its spectrum, and what it draws."""
    columns = []
    for name, words in WAYS.items():
        drawn = newest(images, f"compare_{name}", "compare_ranks")
        file = max(loras.glob(f"compare_{name}*.safetensors"))
        adapter = adapter_file.load(file)
        found = inspect_lora(adapter_file.to_state_dict(adapter), adapter.metadata)
        chart = inspection_charts(found, (drawn.width, drawn.width * 5 // 8))[0]
        heading = f"{words}: {size_text(file.stat().st_size)}"
        columns.append(stacked([(heading, chart), ("", drawn)]))
    return side_by_side(columns, gap=16)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.thumbnails.resume_and_compare", description=__doc__)
    parser.add_argument("workflow", choices=["resume", "compare_ranks"])
    parser.add_argument("folders", type=Path, nargs="+")
    options = parser.parse_args()
    make = resume if options.workflow == "resume" else compare_ranks
    save_thumbnail(make(*options.folders), options.workflow)


if __name__ == "__main__":
    main()
