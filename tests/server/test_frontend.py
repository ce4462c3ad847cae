"""The shipped workflows in ComfyUI's own front end, in a headless browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from launcher.environment import ROOT, RUNTIME
from tests.support.host_server import HostServer
from tests.support.trouble import prompt

if TYPE_CHECKING:
    from playwright.sync_api import Page

WORKFLOWS = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
PROMPTS = ROOT / "tests" / "prompts"
SET_NEWER = "wanted => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', wanted)"
NEWER_BOXES = """() => {
  const scale = window.app.canvas.ds.scale, titles = new Map(window.app.graph.nodes.map(n => [String(n.id), n.title]));
  return [...document.querySelectorAll('[data-node-id]')].filter(e => titles.has(e.dataset.nodeId)).map(element => {
    const {x, y, width, height} = element.getBoundingClientRect();
    return [titles.get(element.dataset.nodeId), ...[x, y, width, height].map(n => Math.round(n / scale))];
  });
}"""
LISTEN = """() => {
  window.heard = {images: 0, texts: 0};
  window.app.api.addEventListener('b_preview', () => window.heard.images++);
  window.app.api.addEventListener('progress_text', () => window.heard.texts++);
}"""


@pytest.fixture(scope="module")
def page(server: HostServer) -> Iterator[Page]:
    """The front end, open in a browser."""
    pytest.importorskip("playwright", reason="playwright is not installed: pip install -r tests/requirements.txt")
    from tests.support.browser import MISSING, find_browser, open_front_end

    if find_browser() is None:
        pytest.skip(f"the front end is not tested, as {MISSING}")
    with open_front_end(server.server.address) as opened:
        yield opened


@pytest.fixture
def workflow(request: pytest.FixtureRequest, page: Page, server: HostServer) -> dict[str, Any]:
    """A workflow as served to the template browser, opened in the front end."""
    from tests.support.browser import load_workflow

    loaded = server.get_json(f"/api/workflow_templates/{server.pack_folder}/{request.param}.json")
    load_workflow(page, loaded)
    return dict(loaded)


def test_the_workflows_exist() -> None:
    assert {"quickstart", "inspect_and_resize"} <= set(WORKFLOWS)


@pytest.mark.parametrize("workflow", WORKFLOWS, indirect=True)
def test_no_node_type_is_missing(workflow: dict[str, Any], page: Page, request: pytest.FixtureRequest) -> None:
    from tests.support.browser import screenshot, unknown_nodes

    screenshot(page, RUNTIME / "screenshots" / f"{request.node.callspec.params['workflow']}.png")
    assert unknown_nodes(page) == []


@pytest.mark.parametrize("workflow", WORKFLOWS, indirect=True)
def test_the_front_end_sends_the_prompt_that_the_tests_run(
    workflow: dict[str, Any], page: Page, request: pytest.FixtureRequest
) -> None:
    from tests.support.browser import api_form

    name = request.node.callspec.params["workflow"]
    assert api_form(page) == json.loads((PROMPTS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("workflow", WORKFLOWS, indirect=True)
def test_nodes_do_not_overlap(workflow: dict[str, Any], page: Page) -> None:
    assert_apart(page.evaluate("() => window.app.graph.nodes.map(node => [node.title, ...node.getBounding()])"))


@pytest.fixture(scope="module")
def newer_nodes(page: Page) -> Iterator[None]:
    """ComfyUI's Nodes 2.0, which are HTML elements, in a window that shows the whole graph."""
    before = page.viewport_size
    page.set_viewport_size({"width": 3200, "height": 2000})
    page.evaluate(SET_NEWER, True)
    yield
    page.evaluate(SET_NEWER, False)
    page.set_viewport_size(before)


@pytest.mark.parametrize("workflow", WORKFLOWS, indirect=True)
def test_nodes_2_0_do_not_overlap(newer_nodes: None, workflow: dict[str, Any], page: Page) -> None:
    from tests.support.browser import FIT_VIEW

    page.evaluate(FIT_VIEW)
    page.wait_for_function(f"wanted => ({NEWER_BOXES})().length === wanted", arg=len(workflow["nodes"]))
    page.wait_for_timeout(1000)  # until the nodes have their sizes
    assert_apart(page.evaluate(NEWER_BOXES))


def assert_apart(boxes: list[Any]) -> None:
    """boxes: (title, left, top, width, height)."""
    for place, (title, x, y, width, height) in enumerate(boxes):
        for other, left, top, wide, high in boxes[place + 1 :]:
            apart = x + width <= left or left + wide <= x or y + height <= top or top + high <= y
            assert apart, f"'{title}' and '{other}' overlap"


@pytest.mark.parametrize(
    ("values", "sent"),
    [
        (["ink.safetensors", 0.5, 1.0], {"cut": "no cut"}),  # as saved before the node could truncate
        (["ink.safetensors", 0.5, 1.0, "rank", 4], {"cut": "rank", "cut.rank": 4}),
        (["ink.safetensors", 0.5, 1.0, "energy", 0.9], {"cut": "energy", "cut.keep": 0.9}),
    ],
    ids=["older", "rank", "energy"],
)
def test_load_sends_its_truncation_and_older_workflows_load_the_whole_lora(
    page: Page, values: list[Any], sent: dict[str, Any]
) -> None:
    from tests.support.browser import api_form, load_workflow

    sockets = [{"name": name, "type": name.upper(), "link": None} for name in ("model", "clip")]
    size = {"pos": [0, 0], "size": [400, 240], "flags": {}, "order": 0, "mode": 0}
    node = {"id": 1, "type": "ACLoRALoad", **size, "inputs": sockets, "outputs": [], "widgets_values": values}
    load_workflow(page, {"last_node_id": 1, "last_link_id": 0, "nodes": [node], "links": [], "version": 0.4})
    strengths = {"strength_model": 0.5, "strength_clip": 1.0}
    assert api_form(page)["1"]["inputs"] == {"lora_name": "ink.safetensors", **strengths, **sent}


@pytest.mark.slow
def test_a_reloaded_page_gets_the_training_chart_and_another_page_nothing(page: Page, server: HostServer) -> None:
    from tests.support.browser import visit, wait_until_ready

    queue = "async prompt => (await window.app.api.queuePrompt(0, {output: prompt, workflow: {}})).prompt_id"
    page.evaluate(LISTEN)
    training = page.evaluate(queue, prompt(server, "watched", steps=100_000))
    try:
        page.wait_for_function("() => window.heard.images > 0")
        page.reload()
        wait_until_ready(page)
        other = page.context.browser.new_page()
        visit(other, server.server.address)
        for each in (page, other):
            each.evaluate(LISTEN)
        page.wait_for_function("() => window.heard.images > 1 && window.heard.texts > 0")
        assert other.evaluate("() => window.heard.texts") == 0  # it may show another workflow, with a node of this id
        assert other.evaluate("() => window.heard.images") == 0
        other.close()
    finally:
        server.post_json("/interrupt", {"prompt_id": training})
    assert server.wait(training)["status"]["status_str"] == "success"


def test_nothing_is_said_of_missing_nodes_where_none_is_missing(page: Page) -> None:
    """nodes/web/missing_nodes.js speaks up where ComfyUI could not load the nodes."""
    assert page.evaluate("() => window.app.extensions.some(each => each.name === 'AC-LoRA.missing-nodes')")
    assert page.locator(".p-toast-message", has_text="AC-LoRA").count() == 0
