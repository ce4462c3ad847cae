"""Make workflows/inspect_and_resize.jpg, the workflow's thumbnail, from the images that the workflow saved.

    python -m tools.thumbnails.inspect_and_resize OUTPUT_FOLDER LORA.safetensors

OUTPUT_FOLDER: the folder with whole_*.png; LORA.safetensors: the LoRA that the workflow loaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from aclora_core.adapter import ResizeConfig, decompose, load, resize, to_state_dict
from aclora_core.inspection import inspect_lora, inspection_charts
from aclora_core.text import size_text
from tools.thumbnails.sheet import newest, save_thumbnail, side_by_side, stacked

KEEP, MEGABYTES = 0.9, 0.1  # as the workflow has them


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.thumbnails.inspect_and_resize", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("lora", type=Path)
    options = parser.parse_args()
    adapter = load(options.lora)
    _, cuts = resize(adapter, decompose(adapter), ResizeConfig("energy", KEEP))
    sizes = [sum(getattr(cut, f"bytes_{when}") for cut in cuts.values()) for when in ("before", "after")]
    names = ("whole", "cut_to_90", "cut_to_100_kB")
    whole, ninety, tiny = (newest(options.folder, name, "inspect_and_resize") for name in names)
    found = inspect_lora(to_state_dict(adapter), adapter.metadata)
    charts = inspection_charts(found, (whole.width // 2, whole.width * 5 // 16))[:2]
    rows = [
        ("", side_by_side(charts)),
        (f"The whole LoRA, {size_text(sizes[0])}", whole),
        (f"Cut to {100 * KEEP:.0f} % of the energy, {size_text(sizes[1])}", ninety),
        (f"Cut to {MEGABYTES} MB", tiny),
    ]
    save_thumbnail(stacked(rows), "inspect_and_resize")


if __name__ == "__main__":
    main()
