"""Open a workflow in ComfyUI's front end, in a headless browser.

    python -m tests.support.browser ADDRESS NAME [SCREENSHOT.png]

converts a shipped workflow into the API form, tests/prompts/NAME.json. ADDRESS is a running server with the pack in it,
for instance the one that `python3 run.py serve` prints. Needs playwright from PyPI and a Chromium: the one in
ACLORA_CHROMIUM, else one that is installed, else playwright's own.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, Route, sync_playwright

from tools.workflow_files import read_workflow

ROOT = Path(__file__).resolve().parents[2]

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "C:/Program Files/Google/Chrome/Application/chrome.exe",
    "C:/Program Files (x86)/Microsoft/Edge/Application/msedge.exe",
)
MISSING = (
    "no Chromium, Chrome or Edge is installed: `apt-get install chromium` on Debian, elsewhere `python -m playwright "
    "install chromium` (on Linux with --with-deps), or set ACLORA_CHROMIUM to its program"
)
PATIENCE = 60_000  # milliseconds

UNKNOWN_NODES = """() => {
  const unknown = [], graphs = [window.app.rootGraph ?? window.app.graph];
  const inner = new Set([...(graphs[0].subgraphs?.values() ?? [])]);
  for (const graph of [...graphs, ...inner])
    for (const node of graph.nodes)
      if (!(node.type in window.LiteGraph.registered_node_types)) unknown.push(node.type);
  return unknown;
}"""

FIT_VIEW = """() => {
  const canvas = window.app.canvas, boxes = canvas.graph.nodes.map(node => node.getBounding());
  const left = Math.min(...boxes.map(b => b[0])), top = Math.min(...boxes.map(b => b[1]));
  const right = Math.max(...boxes.map(b => b[0] + b[2])), bottom = Math.max(...boxes.map(b => b[1] + b[3]));
  canvas.ds.fitToBounds([left, top, right - left, bottom - top], {zoom: 0.9});
  canvas.setDirty(true, true);
}"""


def find_browser() -> str | None:
    """Return the path of a Chromium, or None."""
    named = os.environ.get("ACLORA_CHROMIUM")
    found = [named] if named else [path for name in NAMES if (path := shutil.which(name))]
    found += [place for place in PLACES if Path(place).is_file()]
    return found[0] if found else _downloaded_browser()


def _downloaded_browser() -> str | None:
    """Return the Chromium that `python -m playwright install chromium` downloaded, or None."""
    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).is_file() else None


def skip_welcome(route: Route) -> None:
    """Mark the tutorial as completed for this page, as the template browser would cover the graph."""
    answer = route.fetch()
    settings = answer.json() if route.request.method == "GET" else None
    if isinstance(settings, dict):
        route.fulfill(response=answer, json={**settings, "Comfy.TutorialCompleted": True})
    else:
        route.fulfill(response=answer)


@contextmanager
def open_front_end(address: str) -> Iterator[Page]:
    """Open the front end of a server, ready for a workflow."""
    browser_path = find_browser()
    if browser_path is None:
        raise RuntimeError(MISSING)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=FLAGS)
        try:
            page = browser.new_page(viewport={"width": 1920, "height": 1080})
            visit(page, address)
            yield page
        finally:
            browser.close()


def visit(page: Page, address: str) -> None:
    """Open the front end in a page and wait until it is ready."""
    page.set_default_timeout(PATIENCE)
    page.route("**/api/settings", skip_welcome)
    page.goto(address)
    wait_until_ready(page)


def wait_until_ready(page: Page) -> None:
    """Return once the front end knows its nodes, which come from the server a moment after the page."""
    page.wait_for_function("() => window.app?.extensionManager && window.app.graph && window.LiteGraph")
    page.wait_for_function("() => 'KSampler' in window.LiteGraph.registered_node_types")


def load_workflow(page: Page, workflow: dict[str, Any]) -> None:
    """Open a workflow in the front end, as when its file is dropped onto the page."""
    page.evaluate("workflow => window.app.loadGraphData(workflow)", workflow)
    wanted = len(workflow["nodes"])
    page.wait_for_function("wanted => window.app.graph.nodes.length === wanted", arg=wanted)


def open_prompt(page: Page, prompt: dict[str, Any], name: str) -> None:
    """Open a prompt in API form as a workflow in a tab of its own; its nodes have the sizes of new ones.

    Like a file it has an id of its own, by which ComfyUI knows its runs.
    """
    page.evaluate("([prompt, name]) => window.app.loadApiJson(prompt, name)", [prompt, name])
    page.wait_for_function("wanted => window.app.graph.nodes.length === wanted", arg=len(prompt))
    reopen = """([id, name]) => {
      const graph = window.app.graph.serialize();
      return window.app.loadGraphData({...graph, id}, true, true, name);
    }"""
    page.evaluate(reopen, [str(uuid.uuid4()), f"{name} workflow"])
    page.wait_for_function("wanted => window.app.graph.nodes.length === wanted", arg=len(prompt))


def text_on_node(page: Page, node: str) -> str:
    """Return the text that a node shows; empty without one."""
    widgets = "window.app.graph.getNodeById(id)?.widgets"
    return page.evaluate(f"id => {widgets}?.find(each => each.name === '$$node-text-preview')?.value", node) or ""


def unknown_nodes(page: Page) -> list[str]:
    """Return the node types of the open workflow that the front end does not know."""
    return list(page.evaluate(UNKNOWN_NODES))


def api_form(page: Page) -> dict[str, Any]:
    """Return the open workflow in API form, as the front end would send it."""
    return dict(page.evaluate("async () => (await window.app.graphToPrompt()).output"))


def screenshot(page: Page, path: Path) -> None:
    """Save an image of the whole graph."""
    page.evaluate(FIT_VIEW)
    page.wait_for_timeout(1500)  # images on nodes load later than the nodes
    path.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=path)


def main(address: str, name: str, image_file: str | None = None) -> int:
    """Write the API form of a workflow; return 1 if nodes are missing."""
    prompt_file = ROOT / "tests" / "prompts" / f"{name}.json"
    with open_front_end(address) as page:
        load_workflow(page, read_workflow(name))
        unknown = unknown_nodes(page)
        if unknown:
            print(f"Nodes that {address} does not know: {', '.join(sorted(set(unknown)))}", file=sys.stderr)
            return 1
        prompt = api_form(page)
        if image_file:
            screenshot(page, Path(image_file))
    prompt_file.write_text(json.dumps(prompt, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{prompt_file}: {len(prompt)} nodes")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
