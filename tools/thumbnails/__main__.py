"""Make the workflows' thumbnails, and images of the README and of help pages, from the images that the workflows saved.

    python -m tools.thumbnails OUTPUT_FOLDER [quickstart resume compare_ranks inspect_and_resize evaluate sd15 …]

OUTPUT_FOLDER: ComfyUI's output/aclora, after a run of these workflows; of resume after a cancelled and a finished one.
The workflows for large models cannot be run everywhere: their thumbnails have the model's name, and what the
quickstart's small model learned.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tools.thumbnails.sheet import INK, PAPER, SIDE, TILE, in_rows, newest, side_by_side, square, stacked, tiles
from tools.workflow_files import FILES, WORKFLOWS, workflow_file

ROOT = Path(__file__).resolve().parents[2]
IMAGES, HELP = ROOT / "docs" / "images", ROOT / "nodes" / "web" / "docs" / "images"
MODELS = {"sd15": "SD1.5", "sdxl": "SDXL", "flux": "Flux.1 dev", "z_image": "Z-Image", "qwen_image": "Qwen-Image"}
NAME_HEIGHT, NAME_SIZE = 150, 104  # pixels of the band with a model's name, and of the name if it fits
CAPTIONED, CAPTIONED_WIDTH = 4, 680  # images with their captions, and pixels of such a row
SOME = (1, 2, 4)  # of the six images: castle, cat face, house
NEAREST_ROWS = 0.567  # height of three rows, over the width of the sheet
RANKS = {"rank_1": "Rank 1", "rank_32": "Rank 32", "ac": "AC-LoRA"}
SIZES = {"whole": "The whole LoRA, 1.3 MB"} | {
    f"small_{size}_kB": f"At most 0.{size // 100} MB" for size in (600, 300, 100)
}


def six(folder: Path, name: str, back: int = 0) -> Image.Image:
    """Return the six images that a workflow saved, without the grid's black lines."""
    return in_rows(tiles(newest(folder, name, back)), 3)


def quickstart(folder: Path) -> Image.Image:
    """Show six things before and after."""
    return stacked([(words, six(folder, words.lower())) for words in ("Before", "After")])


def resume(folder: Path) -> Image.Image:
    """Show the images from the cancelled training and from the finished one."""
    cancelled, end = (six(folder, "resume", back) for back in (1, 0))
    return stacked([("Cancelled", cancelled), ("Run again: resumed", end)])


def compare_ranks(folder: Path) -> Image.Image:
    """Show the same things from each LoRA."""
    return stacked([(words, in_rows(tiles(newest(folder, name))[:4], 4)) for name, words in RANKS.items()])


def inspect_and_resize(folder: Path) -> Image.Image:
    """Show the same things at each size of the file."""
    return stacked([(words, in_rows(tiles(newest(folder, name))[:5], 5)) for name, words in SIZES.items()])


def evaluate(folder: Path) -> Image.Image:
    """Show the first rows of the left half of the sheet of nearest images."""
    whole = newest(folder, "nearest")
    width, height = whole.width // 2, round(whole.width * NEAREST_ROWS)
    part = whole.crop((0, 0, width, height)).resize((540, round(540 * height / width)), Image.Resampling.LANCZOS)
    return stacked([("Drawn, nearest training image, nearest real one", part)])


def caption_my_folder(_: Path) -> Image.Image:
    """Show a few of the example images with the captions that lie beside them."""
    rows, examples = [], WORKFLOWS / "example_pictures" / "fluent-emoji-high-contrast"
    for path in sorted(examples.glob("*.png"))[:CAPTIONED]:
        with Image.open(path) as image:
            rows.append((path.with_suffix(".txt").read_text(encoding="utf-8").strip(), image.convert("RGB")))
    row = Image.new("RGB", (CAPTIONED_WIDTH, TILE), PAPER)
    draw, font, sheet = ImageDraw.Draw(row), ImageFont.load_default(40), []
    for caption, image in rows:
        row.paste(PAPER, (0, 0, *row.size))
        row.paste(image.resize((TILE, TILE), Image.Resampling.LANCZOS), (0, 0))
        draw.text((TILE + 20, TILE / 2), caption, INK, font, anchor="lm")
        sheet.append(row.copy())
    return stacked([("A caption for each image of a folder", sheet[0]), *[("", each) for each in sheet[1:]]])


def large_model(folder: Path, name: str) -> Image.Image:
    """Show the model's name, and what the quickstart's style does; the model itself has drawn none of it."""
    rows = [
        (words, in_rows([tiles(newest(folder, words.lower()))[i] for i in SOME], 3)) for words in ("Before", "After")
    ]
    below = stacked(rows)
    sheet = Image.new("RGB", (SIDE, SIDE), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((0, 0, SIDE, NAME_HEIGHT), fill="#17181f")
    size = NAME_SIZE * min(1.0, (SIDE - 60) / draw.textlength(MODELS[name], font=ImageFont.load_default(NAME_SIZE)))
    draw.text((SIDE / 2, NAME_HEIGHT / 2), MODELS[name], "white", ImageFont.load_default(size), anchor="mm")
    scale = (SIDE - NAME_HEIGHT - 60) / below.height
    below = below.resize((round(below.width * scale), round(below.height * scale)), Image.Resampling.LANCZOS)
    sheet.paste(below, ((SIDE - below.width) // 2, NAME_HEIGHT + 12))
    note = "a style of the quickstart's small model"
    draw.text((SIDE / 2, SIDE - 24), note, INK, ImageFont.load_default(22), anchor="mm")
    return sheet


MAKERS: dict[str, Callable[[Path], Image.Image]] = {
    "quickstart": quickstart,
    "resume": resume,
    "compare_ranks": compare_ranks,
    "inspect_and_resize": inspect_and_resize,
    "evaluate": evaluate,
    "caption_my_folder": caption_my_folder,
}


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    image.save(path, quality=85)
    print(f"{path.name}: {image.width} × {image.height}, {path.stat().st_size // 1000} kB")


def document_images(folder: Path, name: str) -> None:
    """Save the images of the README and of help pages that come from a workflow, wider than the thumbnails."""
    if name == "quickstart":
        parts = [stacked([(words, six(folder, words.lower()))]) for words in ("Before", "After")]
        for place in (IMAGES, HELP):
            save(side_by_side(parts), place / "quickstart.webp")
    if name == "inspect_and_resize":
        for place in (IMAGES, HELP):
            save(inspect_and_resize(folder), place / "inspect_and_resize.webp")
    if name == "evaluate":
        save(evaluate(folder), HELP / "evaluate.webp")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.thumbnails", description=__doc__)
    parser.add_argument("folder", type=Path)
    # Python 3.11 looks for the empty list among the choices too.
    parser.add_argument("workflows", nargs="*", choices=[*FILES, []], help="all of them by default", metavar="NAME")
    options = parser.parse_args()
    for name in options.workflows or FILES:
        image = large_model(options.folder, name) if name in MODELS else square(MAKERS[name](options.folder))
        save(image, workflow_file(name, ".jpg"))
        document_images(options.folder, name)


if __name__ == "__main__":
    main()
