"""Sample now and save now: the addresses on ComfyUI's server, and the buttons on the node in both node systems."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import Request

import pytest
from safetensors import safe_open

from aclora_core.adapter import RankReport
from launcher.environment import RUNTIME
from launcher.server import HTTP
from tests.support.host_server import HostServer
from tests.support.server_runs import until
from tests.support.trouble import TRAIN, prompt, says
from tools.front_end import NEWER, SET

if TYPE_CHECKING:
    from playwright.sync_api import Page

SEEDS = itertools.count()  # what is asked of ComfyUI a second time comes out of its cache
NODE = "907"  # the id of the training node, in the prompt and on the page
NOTHING = "No training is running. While the model is still loading, try again in a moment."


def ask(server: HostServer, path: str, node: str | None = None, method: str = "POST", **headers: str) -> Any:
    """Return the status and the message of a request."""
    body = None if method == "GET" else json.dumps({} if node is None else {"node": node}).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = Request(f"{server.server.address}{path}", body, named, method=method)
    try:
        with HTTP.open(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())["message"]
    except HTTPError as error:
        text = error.read()
        return error.code, json.loads(text)["message"] if text.startswith(b"{") else ""


@contextmanager
def training(server: HostServer, previews: bool = True) -> Iterator[dict[str, Any]]:
    """Run a training that would last for hours, and cancel it at the end; yields a place for its history."""
    graph = prompt(server, "asked", steps=100_000, seed=next(SEEDS))
    if previews:
        drawn = {"preview_every": 100_000, "preview_prompts": "a rocket", "preview_guidance": 1.0}
        links = {"clip": ["base", 1], "vae": ["base", 2], "options": ["plain", 0]}
        graph["drawn"] = server.node("ACLoRAPreviewOptions", **drawn | links)
        graph[TRAIN]["inputs"]["options"] = ["drawn", 0]
    renamed = json.loads(json.dumps(graph).replace(f'"{TRAIN}"', f'"{NODE}"'))
    prompt_id, history = server.submit(renamed), dict[str, Any]()
    try:
        until(lambda: ask(server, "/aclora/training/save", "x")[1] != NOTHING, "the training")
        yield history
    finally:
        server.post_json("/interrupt", {"prompt_id": prompt_id})
        history |= server.wait(prompt_id)


def test_without_a_training_there_is_a_sentence(server: HostServer) -> None:
    for kind in ("sample", "save"):
        for path in (f"/aclora/training/{kind}", f"/api/aclora/training/{kind}"):
            assert ask(server, path) == (409, NOTHING)
    assert ask(server, "/aclora/training/delete") == (404, "There is only sample and save.")
    assert ask(server, "/aclora/training/save", method="GET")[0] in (404, 405)


FOREIGN = [
    {"Origin": "http://example.org"},
    {"Sec_Fetch_Site": "cross-site"},
    {"Sec_Fetch_Site": "same-site"},  # another port of this machine, which ComfyUI lets through
]


@pytest.mark.parametrize("headers", FOREIGN, ids=lambda headers: "-".join(headers.values()))
def test_pages_of_other_origins_are_refused(server: HostServer, headers: dict[str, str]) -> None:
    assert ask(server, "/aclora/training/save", **headers)[0] == 403


def test_a_running_training_is_sampled_and_saved(server: HostServer) -> None:
    with training(server) as history:
        assert ask(server, "/aclora/training/save", "x")[0] == 409  # another node's button
        status, drawn = ask(server, "/aclora/training/sample", NODE)
        assert status == 200 and "were drawn, and kept in aclora/fluent-emoji-high-contrast_0" in drawn
        status, saved = ask(server, "/aclora/training/save", f"3:{NODE}")  # as inside a subgraph
        assert status == 200 and saved.startswith("Saved step ") and saved.endswith(" kB.")
    folder = server.base / "output" / "aclora" / drawn.split("aclora/")[1].rstrip(".")
    step = int(drawn.split()[3])
    assert (folder / f"step_{step:06}.png").is_file() and (folder / "sheet.png").is_file()
    summary = says(history, NODE)
    assert saved in summary and f" {step}," in summary.split("Steps to choose from:")[1]
    file = saved.split(" as ")[1].split(" in models/loras")[0]
    assert file in server.get_json("/object_info/LoraLoader")["LoraLoader"]["input"]["required"]["lora_name"][0]
    with safe_open(server.base / "models" / "loras" / file, "pt") as stored:
        metadata = stored.metadata()
    report = RankReport.from_json(metadata["aclora.trajectory"])
    assert report.facts.chosen_step == int(saved.split()[2]) and report.facts.base_model == "SD3"
    assert metadata["modelspec.thumbnail"].startswith("data:image/")
    assert ask(server, "/aclora/training/save") == (409, NOTHING)


def test_without_prompts_nothing_can_be_drawn(server: HostServer) -> None:
    with training(server, previews=False):
        status, message = ask(server, "/aclora/training/sample")
    assert status == 409 and message.startswith("This training has no prompts to draw. Connect AC-LoRA Preview")


@pytest.fixture(scope="module")
def page(server: HostServer) -> Iterator[Page]:
    """The front end, open in a browser, with a training node in its graph."""
    pytest.importorskip("playwright", reason="playwright is not installed: pip install -r tests/requirements.txt")
    from tests.support.browser import MISSING, find_browser, load_workflow, open_front_end

    if find_browser() is None:
        pytest.skip(f"the front end is not tested, as {MISSING}")
    size = {"pos": [0, 0], "size": [400, 300], "flags": {}, "order": 0, "mode": 0}
    values = [321, 0.0005, 4, 32, "all", 7, "fixed", 5]
    node = {"id": int(NODE), "type": "ACLoRATrain", **size, "inputs": [], "outputs": [], "widgets_values": values}
    with open_front_end(server.server.address) as opened:
        load_workflow(opened, {"last_node_id": int(NODE), "nodes": [node], "links": [], "version": 0.4})
        yield opened


@pytest.fixture(params=["classic", "nodes_2_0"])
def buttons(request: pytest.FixtureRequest, page: Page) -> Any:
    """Press a button by its label, as a user does, in either node system."""
    newer = request.param == "nodes_2_0"
    page.evaluate(SET, [NEWER, newer])
    page.evaluate("() => window.app.canvas.ds.fitToBounds([-100, -100, 900, 700])")
    page.wait_for_timeout(1000)

    def press(label: str) -> str:
        """Press it, and return what the page says then."""
        page.evaluate("() => document.querySelectorAll('.p-toast-close-button').forEach(each => each.click())")
        page.wait_for_function("() => !document.querySelector('.p-toast-message')")
        if newer:
            page.get_by_role("button", name=label).click()
        else:
            page.mouse.click(*page.evaluate(PLACE, label))
        toast = page.locator(".p-toast-message", has_text="AC-LoRA")
        toast.wait_for()
        page.screenshot(path=RUNTIME / "screenshots" / f"buttons_{request.param}.png")
        return str(toast.inner_text())

    return press


# The middle of a button on the canvas, in pixels of the page.
PLACE = """label => {
  const node = window.app.graph.nodes[0], canvas = window.app.canvas;
  const widget = node.widgets.find(each => each.label === label || each.name === label);
  const middle = [node.pos[0] + node.size[0] / 2, node.pos[1] + widget.last_y + 10];
  const box = canvas.canvas.getBoundingClientRect();
  return middle.map((at, side) => (at + canvas.ds.offset[side]) * canvas.ds.scale + (side ? box.top : box.left));
}"""


def test_the_buttons_answer_while_nothing_runs(buttons: Any) -> None:
    for label in ("Sample now", "Save now"):
        assert NOTHING in buttons(label)


def test_the_buttons_ask_the_training_that_runs(server: HostServer, buttons: Any) -> None:
    with training(server):
        assert "were drawn, and kept in aclora/" in buttons("Sample now")
        assert "Saved step " in buttons("Save now")


def test_the_buttons_leave_workflows_and_prompts_as_they_were(page: Page) -> None:
    from tests.support.browser import api_form

    saved = page.evaluate("() => window.app.graph.serialize().nodes[0].widgets_values")
    assert saved == [321, 0.0005, 4, 32, "all", 7, "fixed", 5]
    assert not {"Sample now", "Save now"} & api_form(page)[NODE]["inputs"].keys()
