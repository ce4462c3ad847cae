"""The shipped workflows in ComfyUI's own front end, in a headless browser."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

from launcher.environment import ROOT, RUNTIME
from tests.support.host_server import HostServer
from tests.support.trouble import prompt
from tools.workflow_files import FILES

if TYPE_CHECKING:
    from playwright.sync_api import Page

PROMPTS = ROOT / "tests" / "prompts"
LISTEN = """() => {
  window.heard = {images: 0, texts: 0};
  window.app.api.addEventListener('b_preview', () => window.heard.images++);
  window.app.api.addEventListener('progress_text', () => window.heard.texts++);
}"""


@pytest.fixture
def workflow(request: pytest.FixtureRequest, page: Page, server: HostServer) -> dict[str, Any]:
    """A workflow as served to the template browser, opened in the front end."""
    from tests.support.browser import load_workflow

    loaded = server.get_json(f"/api/workflow_templates/{server.pack_folder}/{quote(FILES[request.param])}.json")
    load_workflow(page, loaded)
    return dict(loaded)


@pytest.mark.parametrize("workflow", FILES, indirect=True)
def test_no_node_type_is_missing(workflow: dict[str, Any], page: Page, request: pytest.FixtureRequest) -> None:
    from tests.support.browser import screenshot, unknown_nodes

    screenshot(page, RUNTIME / "screenshots" / f"{request.node.callspec.params['workflow']}.png")
    assert unknown_nodes(page) == []


@pytest.mark.parametrize("workflow", FILES, indirect=True)
def test_the_front_end_sends_the_prompt_that_the_tests_run(
    workflow: dict[str, Any], page: Page, request: pytest.FixtureRequest
) -> None:
    from tests.support.browser import api_form

    name = request.node.callspec.params["workflow"]
    assert api_form(page) == json.loads((PROMPTS / f"{name}.json").read_text(encoding="utf-8"))


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
