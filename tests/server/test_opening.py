"""How the templates are found and how they open: large enough to read, nothing on top of another, no text cut off."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tools.front_end import NEWER, OPEN, SET, STILL
from tools.workflow_files import FILES, read_workflow

if TYPE_CHECKING:
    from playwright.sync_api import Page

READABLE = 0.6  # scale; below 0.57 the front end draws boxes without text
SCREEN = {"width": 1920, "height": 1080}
SMALL_WINDOWS = [(1600, 1000), (1366, 768)]
# Labels and values that do not fit end in "…": on the canvas in what is drawn, in Nodes 2.0 by the style.
REMEMBER_CUTS = """() => {
  const draw = CanvasRenderingContext2D.prototype.fillText;
  window.cutTexts = [];
  CanvasRenderingContext2D.prototype.fillText = function (text, ...place) {
    if (String(text).includes("…")) window.cutTexts.push(window.lastText);
    window.lastText = text;
    return draw.call(this, text, ...place);
  };
}"""
CUTS = """newer => {
  const places = "[data-node-id] *, .comfy-multiline-input, .ProseMirror, .comfy-markdown-content";
  const elements = [...document.querySelectorAll(places)]
    .filter(each => each.checkVisibility({visibilityProperty: true, opacityProperty: true}));
  const style = each => getComputedStyle(each);
  const shortened = elements.filter(each =>
    style(each).textOverflow === 'ellipsis' && each.scrollWidth > each.clientWidth + 1);
  const scrolled = elements.filter(each => each.clientHeight > 0 && each.scrollHeight > each.clientHeight + 2
    && ['auto', 'scroll', 'hidden'].includes(style(each).overflowY));
  const texts = [...shortened, ...scrolled].map(each => each.value ?? each.innerText).filter(text => text);
  return newer ? texts : [...texts, ...window.cutTexts];
}"""
BOXES = "() => window.app.graph.nodes.map(node => [node.title, ...node.getBounding()])"
NEWER_BOXES = """() => {
  const {scale, offset} = window.app.canvas.ds;
  const titles = new Map(window.app.graph.nodes.map(node => [String(node.id), node.title]));
  return [...document.querySelectorAll('[data-node-id]')].filter(e => titles.has(e.dataset.nodeId)).map(element => {
    const {x, y, width, height} = element.getBoundingClientRect();
    const box = [x / scale - offset[0], y / scale - offset[1], width / scale, height / scale];
    return [titles.get(element.dataset.nodeId), ...box.map(Math.round)];
  });
}"""
FRAMED = """boxes => window.app.graph.groups.flatMap(({title: frame, pos, size}) => boxes
  .filter(([, x, y]) => x >= pos[0] && x < pos[0] + size[0] && y >= pos[1] && y < pos[1] + size[1])
  .filter(([, x, y, width, height]) => x + width > pos[0] + size[0] || y + height > pos[1] + size[1])
  .map(([node]) => `${node} leaves ${frame}`))"""
VIEW = "() => [window.app.canvas.ds.scale, ...window.app.canvas.ds.offset]"
# Places on the screen: left, top, right, bottom.
ON_SCREEN = """type => {
  const {scale, offset} = window.app.canvas.ds, {pos, size} = window.app.graph.nodes.find(node => node.type === type);
  const corner = [pos[0], pos[1] - 30, pos[0] + size[0], pos[1] + size[1]];
  return corner.map((place, side) => (place + offset[side % 2]) * scale);
}"""
SHOWN = """() => [...document.querySelectorAll('[data-testid^="template-workflow-"]')]
  .map(card => card.dataset.testid.replace('template-workflow-', ''))"""
SEARCHED = f"""before => {{
  const names = ({SHOWN})();
  const found = names[0] !== before[0] || (before.length < 20 && String(names) !== String(before));
  return names.length > 0 && names.length < 400 && found;
}}"""
SEARCHES = {  # words, and the workflows that they find
    "train a lora": set(FILES) - {"inspect_and_resize", "evaluate", "caption_my_folder"},
    "style": set(FILES) - {"inspect_and_resize"},
    "AC-LoRA": set(FILES),
    "aclora": set(FILES) - {"inspect_and_resize"},
    "sdxl": {"sdxl"},
    "inspect": {"inspect_and_resize"},
}


@pytest.fixture(scope="module", params=[False, True], ids=["classic", "nodes-2-0"])
def newer(page: Page, request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether nodes are HTML elements (Nodes 2.0) or drawn on a canvas, on a usual screen."""
    before = page.viewport_size
    page.set_viewport_size(SCREEN)
    page.evaluate(REMEMBER_CUTS)
    page.evaluate(SET, [NEWER, request.param])
    yield request.param
    page.evaluate(SET, [NEWER, False])
    page.set_viewport_size(before)


@pytest.fixture
def opened(newer: bool, page: Page, request: pytest.FixtureRequest) -> dict[str, Any]:
    """A workflow, opened as the template browser does it."""
    workflow = read_workflow(request.param)
    page.evaluate(OPEN, [workflow, request.param])
    page.wait_for_function("wanted => window.app.graph.nodes.length === wanted", arg=len(workflow["nodes"]))
    page.evaluate(STILL)
    return workflow


@pytest.mark.slow
@pytest.mark.parametrize("opened", FILES, indirect=True)
def test_it_opens_readable_and_nothing_overlaps_or_is_cut(newer: bool, opened: dict[str, Any], page: Page) -> None:
    assert page.evaluate("() => window.app.canvas.ds.scale") >= READABLE
    boxes = page.evaluate(NEWER_BOXES if newer else BOXES)
    assert len(boxes) == len(opened["nodes"])
    assert_apart(boxes)
    assert page.evaluate(FRAMED, boxes) == []
    page.evaluate("() => { window.cutTexts = []; window.app.canvas.setDirty(true, true); }")
    page.wait_for_timeout(500)
    assert page.evaluate(CUTS, newer) == []


@pytest.mark.parametrize("window", SMALL_WINDOWS)
@pytest.mark.parametrize("name", ["quickstart", "flux"])
def test_in_a_small_window_too_it_opens_readable_and_shows_the_first_steps(
    newer: bool, name: str, window: tuple[int, int], page: Page
) -> None:
    width, height = window
    page.set_viewport_size({"width": width, "height": height})
    open_template(page, name, f"{name} {window} {newer}")
    scale, _, _ = page.evaluate(VIEW)
    assert READABLE <= scale < 0.7
    for kind in ("MarkdownNote", "ACLoRADataset", "ACLoRATrain"):
        left, top, right, _ = page.evaluate(ON_SCREEN, kind)
        assert left >= 60 and top >= 94  # the bars of the front end
        assert right <= width and top <= height - 200


def test_the_view_stays_as_someone_left_it(newer: bool, page: Page) -> None:
    """A view that was saved or zoomed stays, and so does that of other workflows."""
    left, name = [0.4, -50.0, 70.0], f"left {newer}"
    open_template(page, "quickstart", name)
    page.evaluate("([scale, ...offset]) => Object.assign(window.app.canvas.ds, {scale, offset})", left)
    saved = page.evaluate("() => window.app.graph.serialize()")
    assert saved["extra"]["ds"]["scale"] == left[0]

    foreign = {**read_workflow("quickstart"), "id": str(uuid.uuid4()), "extra": {}}
    page.evaluate(OPEN, [foreign, f"foreign {newer}"])
    assert page.evaluate(VIEW)[0] < 0.65  # as the front end fits any workflow
    page.evaluate("() => window.app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")
    page.wait_for_function("wanted => window.app.canvas.ds.scale === wanted", arg=left[0])
    assert page.evaluate(VIEW) == left
    page.evaluate("([saved, name]) => window.app.loadGraphData(saved, true, true, name)", [saved, f"{name} and saved"])
    assert page.evaluate(VIEW) == left


def open_template(page: Page, name: str, title: str) -> None:
    """Open a workflow as the template browser does it, in a tab of its own."""
    page.evaluate(OPEN, [{**read_workflow(name), "id": str(uuid.uuid4())}, title])


def assert_apart(boxes: list[Any]) -> None:
    """boxes: (title, left, top, width, height)."""
    for place, (title, x, y, width, height) in enumerate(boxes):
        for other, left, top, wide, high in boxes[place + 1 :]:
            apart = x + width <= left or left + wide <= x or y + height <= top or top + high <= y
            assert apart, f"'{title}' and '{other}' overlap"


def test_what_does_not_fit_is_noticed(newer: bool, page: Page) -> None:
    """A node of 210 units cannot show a long name; a short note not all of its lines, unless it grows (Nodes 2.0)."""
    workflow = read_workflow("sd15")
    for node in workflow["nodes"]:
        if node["type"] in ("CheckpointLoaderSimple", "MarkdownNote"):
            node["size"] = [210, 200]
    page.evaluate(OPEN, [workflow, "cut"])
    page.evaluate(STILL)
    page.evaluate("() => { window.cutTexts = []; window.app.canvas.setDirty(true, true); }")
    page.wait_for_timeout(500)
    cut = page.evaluate(CUTS, newer)
    assert any(len(text) < 40 for text in cut), cut
    assert newer or any("your images" in text for text in cut), cut


def test_the_search_for_templates_finds_them(page: Page) -> None:
    page.evaluate("() => window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.wait_for_function(f"() => ({SHOWN})().length > 0")
    for words, found in SEARCHES.items():
        names = [name for name in found_templates(page, words) if name in FILES.values()]
        assert {FILES[name] for name in found} <= set(names), words
        assert "quickstart" not in found or names[0] == FILES["quickstart"], words
    page.keyboard.press("Escape")


def found_templates(page: Page, words: str) -> list[str]:
    """Search the open template browser and return what it shows once it is done."""
    before = page.evaluate(SHOWN)
    page.get_by_placeholder("Search").last.fill(words)
    # The search begins some time after the last letter. Before that, all templates may come.
    page.wait_for_function(SEARCHED, arg=before)
    page.wait_for_timeout(500)
    return list(page.evaluate(SHOWN))
