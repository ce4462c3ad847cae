"""Makes workflows/inspect_and_resize.jpg, the workflow's thumbnail, from what that workflow drew.

    python -m tools.inspect_picture OUTPUT_FOLDER LORA.safetensors    # the folder with whole_*.png, and what was loaded
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from aclora_core import adapter_file
from aclora_core.cut_chart import size_text
from aclora_core.cutting import balance
from aclora_core.inspection import inspect_lora
from aclora_core.inspection_charts import inspection_charts
from aclora_core.resizing import ResizeConfig, resize

TARGET = Path(__file__).resolve().parents[1] / "workflows" / "inspect_and_resize.jpg"
HEADING = 34  # pixels above each row
KEEP, MEGABYTES = 0.9, 0.1  # as the workflow has them


def newest(folder: Path, name: str) -> Image.Image:
    """The last picture that the workflow saved under a name."""
    files = sorted(folder.glob(f"{name}_*.png"))
    if not files:
        raise SystemExit(f"{folder} has no {name}_*.png. Run workflows/inspect_and_resize.json first.")
    return Image.open(files[-1]).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.inspect_picture", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("lora", type=Path)
    options = parser.parse_args()
    adapter = adapter_file.load(options.lora)
    _, cuts = resize(adapter, balance(adapter), ResizeConfig("energy", KEEP))
    sizes = [sum(getattr(cut, f"bytes_{when}") for cut in cuts.values()) for when in ("before", "after")]
    rows = [
        (f"The whole LoRA, {size_text(sizes[0])}", newest(options.folder, "whole")),
        (f"Cut to {100 * KEEP:.0f} % of the energy, {size_text(sizes[1])}", newest(options.folder, "cut_to_90")),
        (f"Cut to {MEGABYTES} MB", newest(options.folder, "cut_to_100_kB")),
    ]
    width = rows[0][1].width
    size = (width // 2, width * 5 // 16)
    found = inspect_lora(adapter_file.to_state_dict(adapter), adapter.metadata)
    charts = inspection_charts(found, size)[:2]
    height = size[1] + sum(HEADING + picture.height for _, picture in rows)
    sheet = Image.new("RGB", (width, height), "white")
    for place, chart in enumerate(charts):
        sheet.paste(chart, (place * size[0], 0))
    draw, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(20), size[1]
    for words, picture in rows:
        draw.text((8, top + 5), words, "black", font)
        sheet.paste(picture, (0, top + HEADING))
        top += HEADING + picture.height
    sheet.save(TARGET, quality=92)
    print(f"{TARGET.name}: {sheet.width} × {sheet.height}")


if __name__ == "__main__":
    main()
