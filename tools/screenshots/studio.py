"""A page of ComfyUI's front end that takes screenshots: whole windows, single nodes, and dialogs."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page

from tools.front_end import NEWER, OPEN, RUN, SET
from tools.workflow_files import FILES, read_workflow

TRAINING_PATIENCE = 20 * 60_000  # milliseconds
QUALITY = 82  # of WebP
NODE = "window.app.graph.nodes.find(node => node.type === type)"
# Shows a node at a scale, in the middle of the free part of the window, and returns its place on the screen.
SHOW_NODE = f"""([type, scale]) => {{
  const node = {NODE}, canvas = window.app.canvas, [x, y, width, height] = node.getBounding();
  const area = document.querySelector(".graph-canvas-panel").getBoundingClientRect();
  const middle = [area.x + area.width / 2, area.y + area.height / 2];
  canvas.ds.scale = scale;
  canvas.ds.offset = [middle[0] / scale - x - width / 2, middle[1] / scale - y - height / 2];
  canvas.setDirty(true, true);
}}"""
BOX = f"""type => {{
  const node = {NODE}, {{scale, offset}} = window.app.canvas.ds;
  const element = document.querySelector(`[data-node-id="${{node.id}}"]`);
  if (element) return Object.values(element.getBoundingClientRect().toJSON()).slice(0, 4);
  const [x, y, width, height] = node.getBounding();
  return [(x + offset[0]) * scale, (y + offset[1]) * scale, width * scale, height * scale];
}}"""


@dataclass(frozen=True)
class View:
    """How the front end looks in a screenshot."""

    width: int = 1600  # pixels
    height: int = 1000
    newer: bool = False  # Nodes 2.0
    dark: bool = True

    @property
    def name(self) -> str:
        """Such as "1600x1000-classic-dark"."""
        kind, theme = "nodes2" if self.newer else "classic", "dark" if self.dark else "light"
        return f"{self.width}x{self.height}-{kind}-{theme}"


class Studio:
    """A page, and what is done with it.

    Args:
        page: the front end, ready for a workflow.
        folder: where the screenshots are written.
        folders: by name of a screenshot, where that is another one.
    """

    def __init__(self, page: Page, folder: Path, folders: Mapping[str, Path]) -> None:
        self.page, self.folder, self.folders = page, folder, folders
        folder.mkdir(parents=True, exist_ok=True)
        self.set("Comfy.Minimap.Visible", False)
        self.set("Comfy.Graph.CanvasInfo", False)

    def set(self, name: str, value: Any) -> None:
        """Change a setting of the front end."""
        self.page.evaluate(SET, [name, value])

    def look(self, view: View) -> None:
        """Change the size of the window, the kind of nodes and the colours."""
        self.page.set_viewport_size({"width": view.width, "height": view.height})
        self.set(NEWER, view.newer)
        self.set("Comfy.ColorPalette", "dark" if view.dark else "light")
        self.page.wait_for_timeout(1500)

    def open(self, name: str, title: str = "") -> None:
        """Open a workflow as the template browser does it."""
        workflow = read_workflow(name)
        self.page.evaluate(OPEN, [workflow, title or FILES[name]])
        self.page.wait_for_function("count => window.app.graph.nodes.length === count", arg=len(workflow["nodes"]))
        self.page.wait_for_timeout(2500)  # until nodes and texts have their sizes

    def start(self) -> None:
        """Run the open workflow."""
        self.page.evaluate(RUN)

    def wait_for_end(self) -> None:
        """Return once the run has ended, and its images are there."""
        self.page.wait_for_function("() => window.ended === 2", timeout=TRAINING_PATIENCE)
        self.page.wait_for_timeout(4000)

    def wait_for_text(self, kind: str, words: str) -> None:
        """Return once a node of a type shows these words."""
        text = f"{NODE}.widgets?.find(each => each.name === '$$node-text-preview')?.value"
        self.page.wait_for_function(
            f"([type, words]) => String({text}).includes(words)", arg=[kind, words], timeout=TRAINING_PATIENCE
        )

    def change(self, kind: str, name: str, value: Any) -> Any:
        """Change a value on a node of a type, and return what it was."""
        change = f"""([type, name, value]) => {{
          const widget = {NODE}.widgets.find(each => each.name === name), before = widget.value;
          widget.value = value;
          return before;
        }}"""
        return self.page.evaluate(change, [kind, name, value])

    def press(self, kind: str, button: str) -> None:
        """Press a button of a node of a type."""
        widget = f"{NODE}.widgets.find(each => each.name === name)"
        self.page.evaluate(f"([type, name]) => {widget}.callback()", [kind, button])

    def window(self, name: str, width: int = 0) -> None:
        """Save the whole window. width: of the file in pixels; 0 leaves it as it is."""
        self.image(name, self.page.screenshot(), width)

    def node(self, name: str, kind: str, scale: float = 1.0, margin: int = 12, width: int = 0) -> None:
        """Save a node of a type at a scale. width: of the file in pixels; 0 leaves it as it is."""
        before = self.page.evaluate("() => [window.app.canvas.ds.scale, [...window.app.canvas.ds.offset]]")
        self.page.evaluate(SHOW_NODE, [kind, scale])
        self.page.wait_for_timeout(2000)
        x, y, w, h = self.page.evaluate(BOX, kind)
        clip = {"x": x - margin, "y": y - margin, "width": w + 2 * margin, "height": h + 2 * margin}
        self.image(name, self.page.screenshot(clip=clip), width)
        self.page.evaluate("([scale, offset]) => Object.assign(window.app.canvas.ds, {scale, offset})", before)

    def element(self, name: str, selector: str, width: int = 0) -> None:
        """Save what a CSS selector finds."""
        self.image(name, self.page.locator(selector).first.screenshot(), width)

    def image(self, name: str, png: bytes, width: int = 0) -> None:
        """Save an image as WebP."""
        image = Image.open(io.BytesIO(png)).convert("RGB")
        if width and width < image.width:
            image = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
        path = self.folders.get(name, self.folder) / f"{name}.webp"
        image.save(path, quality=QUALITY, method=6)
        print(f"{path.name}: {image.width} × {image.height}, {path.stat().st_size // 1000} kB", flush=True)
