"""Make thumbnails that show a workflow's graph, for workflows whose models are too large to run here.

    python -m tools.thumbnails.graph ADDRESS sd15 sdxl flux z_image caption_my_folder

ADDRESS is a running server with the pack in it. Needs what tests/support/browser.py needs.
"""

from __future__ import annotations

import argparse
import io
import json

from PIL import Image, ImageDraw, ImageFont
from playwright.sync_api import Page

from tests.support.browser import load_workflow, open_front_end
from tools.thumbnails.sheet import WORKFLOWS, save_thumbnail

WIDTH = 1280  # pixels of a thumbnail
# Written on the thumbnail, as the graphs look alike.
TITLES = {"sd15": "SD1.5", "sdxl": "SDXL", "flux": "Flux.1 dev", "z_image": "Z-Image", "caption_my_folder": "Captions"}
MARGIN = 30  # around the graph, in its own units
WINDOW_MARGINS = (120, 140, 520, 60)  # left, top, right, bottom: covered by the front end's bars and messages

# Places the graph at scale 1 beside the front end's bars, without the red frames of missing files.
PLACE = """([margin, left, top]) => {
  const graph = window.app.graph, canvas = window.app.canvas;
  const boxes = [...graph.nodes.map(node => node.getBounding()), ...graph._groups.map(group => group._bounding)];
  const x = Math.min(...boxes.map(b => b[0])) - margin, y = Math.min(...boxes.map(b => b[1])) - margin;
  const right = Math.max(...boxes.map(b => b[0] + b[2])), bottom = Math.max(...boxes.map(b => b[1] + b[3]));
  for (const node of graph.nodes) { node.has_errors = false; node.strokeStyles = {}; }
  canvas.ds.scale = 1;
  canvas.ds.offset = [left - x, top - y];
  canvas.setDirty(true, true);
  return [right - x + margin, bottom - y + margin];
}"""


def screenshot(page: Page, name: str) -> Image.Image:
    """Return an image of a workflow's graph."""
    load_workflow(page, json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8")))
    left, top, right, bottom = WINDOW_MARGINS
    width, height = page.evaluate(PLACE, [MARGIN, left, top])
    page.set_viewport_size({"width": int(width) + left + right, "height": int(height) + top + bottom})
    page.wait_for_timeout(1000)
    page.evaluate(PLACE, [MARGIN, left, top])  # again, as the new window size has moved it
    page.wait_for_timeout(2000)
    shot = page.screenshot(clip={"x": left, "y": top, "width": width, "height": height})
    return Image.open(io.BytesIO(shot)).convert("RGB")


def with_title(shot: Image.Image, name: str) -> Image.Image:
    """Return the thumbnail, with the model's name in large letters at its lower edge."""
    small = shot.resize((WIDTH, round(shot.height * WIDTH / shot.width)), Image.Resampling.LANCZOS)
    font, place = ImageFont.load_default(150), (40, small.height - 200)
    ImageDraw.Draw(small).text(place, TITLES.get(name, name), "white", font, stroke_width=8, stroke_fill="black")
    return small


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.thumbnails.graph", description=__doc__)
    parser.add_argument("address")
    parser.add_argument("workflows", nargs="+")
    options = parser.parse_args()
    with open_front_end(options.address) as page:
        for name in options.workflows:
            save_thumbnail(with_title(screenshot(page, name), name), name)


if __name__ == "__main__":
    main()
