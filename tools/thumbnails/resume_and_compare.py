"""Make workflows/resume.jpg and workflows/compare_ranks.jpg, their thumbnails, from the images that they saved.

    python -m tools.thumbnails.resume_and_compare resume OUTPUT_FOLDER
    python -m tools.thumbnails.resume_and_compare compare_ranks OUTPUT_FOLDER LORAS

resume: after a cancelled and a finished run of the workflow. LORAS: the folder with compare_*.safetensors.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from aclora_core.adapter import load, to_state_dict
from aclora_core.inspection import inspect_lora, inspection_charts
from aclora_core.text import size_text
from tools.thumbnails.sheet import newest, save_thumbnail, side_by_side, stacked

HEADINGS = {"rank_2": "A plain LoRA of rank 2", "rank_32": "A plain LoRA of rank 32", "ac": "AC-LoRA, rank 32 at most"}


def resume(images: Path) -> Image.Image:
    """Show the images from the cancelled training and from the finished one."""
    cancelled, end = (newest(images, "resume", "resume", back) for back in (1, 0))
    return stacked([("Cancelled", cancelled), ("Run again: resumed and finished", end)])


def compare_ranks(images: Path, loras: Path) -> Image.Image:
    """Show a column for each LoRA: its file size, its spectrum and its images."""
    columns = []
    for name, words in HEADINGS.items():
        drawn = newest(images, f"compare_{name}", "compare_ranks")
        file = max(loras.glob(f"compare_{name}*.safetensors"))
        adapter = load(file)
        found = inspect_lora(to_state_dict(adapter), adapter.metadata)
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
