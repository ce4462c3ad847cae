"""The images of a dataset before the training: the routes of the panel, and the panel in both kinds of nodes."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request

import pytest
from PIL import Image

from launcher.environment import ROOT
from launcher.server import HTTP
from tests.support.dataset_calls import draw
from tests.support.host_server import HostServer
from tools.front_end import NEWER, SET, STILL

if TYPE_CHECKING:
    from playwright.sync_api import Page

IMAGES = 30
EXAMPLE = "example: fluent-emoji-high-contrast"
BUTTON = "Images and captions"
VISIBLE_ROWS = """() => window.app.graph.nodes[1].widgets.filter(each => !each.hidden).map(each => each.name)"""


@pytest.fixture
def folder(server: HostServer) -> Iterator[Path]:
    """A folder of thirty images with captions in ComfyUI's input folder."""
    path = server.base / "input" / "browsed"
    for number in range(IMAGES):
        draw(path / f"{number}.png", number)
        (path / f"{number}.txt").write_text(f"image {number}", encoding="utf-8")
    yield path
    shutil.rmtree(path)


def listed(server: HostServer, folder: str = "browsed", **settings: Any) -> dict[str, Any]:
    return dict(server.get_json(f"/aclora/dataset?{urlencode({'folder': folder, 'resolution': 64, **settings})}"))


def save(server: HostServer, image: str, text: str, version: str, folder: str = "browsed") -> dict[str, Any]:
    sent = {"folder": folder, "resolution": 64, "image": image, "text": text, "version": version}
    return dict(server.post_json("/aclora/dataset/caption", sent))


def refusal(call: Any) -> tuple[int, str]:
    """Return the status of a refused request, and its sentence."""
    with pytest.raises(HTTPError) as refused:
        call()
    with refused.value as answer:
        return answer.code, json.loads(answer.read())["error"]


def test_all_images_are_listed_with_captions_sizes_and_remarks(server: HostServer, folder: Path) -> None:
    (folder / "3.txt").unlink()
    (folder / "4.txt").write_bytes(b"\xff")
    (folder / "5.png").write_text("no image")
    draw(folder / "2_more" / "again.png", 99)
    found = listed(server, trigger_word="ink")
    images = {each["name"]: each for each in found["images"]}
    assert list(images)[:3] == ["0.png", "1.png", "2.png"] and len(images) == IMAGES + 1
    plain = images["0.png"]
    assert (plain["text"], plain["file"], plain["problem"], plain["remarks"]) == ("image 0", "0.txt", "", [])
    assert (plain["size"], plain["learned_size"], plain["learned_as"]) == ([96, 64], [80, 48], ["ink, image 0"])
    assert images["3.png"]["remarks"] == ["no caption"] and images["3.png"]["learned_as"] == ["ink"]
    assert "4.txt of 4.png is not UTF-8" in images["4.png"]["problem"]
    assert "5.png was skipped" in images["5.png"]["problem"] and "size" not in images["5.png"]
    assert images["2_more/again.png"]["remarks"] == ["no caption", "counts 2 times"]


def test_a_thumbnail_is_the_image_as_it_is_cropped(server: HostServer, folder: Path) -> None:
    query = urlencode({"folder": "browsed", "resolution": 64, "image": "0.png"})
    found = Image.open(io.BytesIO(server.get(f"/aclora/dataset/thumbnail?{query}")))
    assert found.size == (80, 48) and found.format == "WEBP"


def test_a_saved_caption_keeps_the_old_one_and_is_noticed_by_the_node(server: HostServer, folder: Path) -> None:
    base, dataset = server.node("ACLoRATinyBase"), server.node("ACLoRADataset", folder="browsed", resolution=64)
    prompt = {"1": base, "2": {**dataset, "inputs": {**dataset["inputs"], "vae": ["1", 2], "clip": ["1", 1]}}}
    assert server.run(prompt)["outputs"].keys() == {"2"}  # it can be run alone
    assert "2" in cached(server.run(prompt))
    version = listed(server)["images"][0]["version"]
    saved = save(server, "0.png", "ein Bild, größer", version)
    assert (saved["text"], saved["learned_as"]) == ("ein Bild, größer", ["ein Bild, größer"])
    assert (folder / "0.txt").read_bytes() == "ein Bild, größer\n".encode()
    assert (folder / "0.txt.bak").read_text(encoding="utf-8") == "image 0"
    assert "2" not in cached(server.run(prompt))
    assert listed(server)["remarks"] == []


def cached(history: dict[str, Any]) -> list[str]:
    """The nodes of a prompt that were not run again."""
    (found,) = (facts["nodes"] for kind, facts in history["status"]["messages"] if kind == "execution_cached")
    return list(found)


def test_what_is_not_saved_is_told_why(server: HostServer, folder: Path) -> None:
    shown = listed(server)["images"][0]["version"]
    (folder / "0.txt").write_text("changed elsewhere", encoding="utf-8")
    status, sentence = refusal(lambda: save(server, "0.png", "mine", shown))
    assert status == 409 and sentence.startswith("0.txt has changed since it was shown here")
    assert (folder / "0.txt").read_text(encoding="utf-8") == "changed elsewhere"
    version = listed(server)["images"][0]["version"]
    assert "longer than 10,000 characters" in refusal(lambda: save(server, "0.png", "x" * 10_001, version))[1]
    assert "no longer in the folder" in refusal(lambda: save(server, "../browsed/0.png", "x", version))[1]
    assert "leads outside the allowed folders" in refusal(lambda: save(server, "0.png", "x", version, "../input"))[1]
    assert "does not exist" in refusal(lambda: listed(server, "nowhere"))[1]
    assert "resolution has to be 64 to 4096" in refusal(lambda: listed(server, resolution=1))[1]


def test_the_examples_are_shown_and_stay_as_they_are(server: HostServer) -> None:
    found = listed(server, EXAMPLE)
    assert len(found["images"]) == 24 and "Copy the folder" in found["read_only"]
    image = found["images"][0]
    before = sorted((ROOT / "workflows" / "example_pictures").rglob("*"))
    assert "Copy the folder" in refusal(lambda: save(server, image["name"], "x", image["version"], EXAMPLE))[1]
    assert sorted((ROOT / "workflows" / "example_pictures").rglob("*")) == before


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "comfy.example:8188", "Origin": "http://evil.example"},  # the host itself protects 127.0.0.1 alone
        {"Host": "comfy.example:8188", "Sec-Fetch-Site": "same-site"},
        {"Host": "comfy.example:8188", "Content-Type": "text/plain"},
    ],
)
def test_pages_of_other_sites_change_nothing(server: HostServer, folder: Path, headers: dict[str, str]) -> None:
    version = listed(server)["images"][0]["version"]
    sent = {"folder": "browsed", "image": "0.png", "text": "evil", "version": version}
    address = f"{server.server.address}/aclora/dataset/caption"
    with pytest.raises(HTTPError) as refused:
        HTTP.open(Request(address, json.dumps(sent).encode(), {"Content-Type": "application/json", **headers}))
    with refused.value as answer:
        assert answer.code in (400, 403)
    assert (folder / "0.txt").read_text(encoding="utf-8") == "image 0"
    own = {"Host": "comfy.example:8188", "Origin": "http://comfy.example:8188", "Content-Type": "application/json"}
    HTTP.open(Request(address, json.dumps({**sent, "text": "mine"}).encode(), own)).close()
    assert (folder / "0.txt").read_text(encoding="utf-8") == "mine\n"


@pytest.fixture(params=["classic nodes", "Nodes 2.0"])
def graph(request: pytest.FixtureRequest, page: Page, server: HostServer, folder: Path) -> Iterator[Page]:
    """A dataset node and the tiny base, in one of the front end's two kinds of nodes."""
    from tests.support.browser import load_workflow

    sockets = [{"name": name, "type": name.upper(), "link": link} for name, link in (("vae", 1), ("clip", 2))]
    outputs = [("model", "MODEL", []), ("clip", "CLIP", [2]), ("vae", "VAE", [1])]
    place = {"flags": {}, "order": 0, "mode": 0}
    base = {
        **{"id": 1, "type": "ACLoRATinyBase", "pos": [0, 0], "size": [240, 80], "inputs": [], **place},
        "outputs": [{"name": name, "type": kind, "links": links} for name, kind, links in outputs],
    }
    dataset = {
        **{"id": 2, "type": "ACLoRADataset", "pos": [300, 0], "size": [400, 500], "inputs": sockets, **place},
        **{"outputs": [], "widgets_values": ["browsed", 64, "ink"]},
    }
    links = [[1, 1, 2, 2, 0, "VAE"], [2, 1, 1, 2, 1, "CLIP"]]
    load_workflow(
        page, {"last_node_id": 2, "last_link_id": 2, "nodes": [base, dataset], "links": links, "version": 0.4}
    )
    page.evaluate(SET, [NEWER, request.param == "Nodes 2.0"])
    page.evaluate("() => window.app.canvas.ds.fitToBounds([0, -100, 900, 700], {zoom: 0.8})")
    page.evaluate(STILL)
    yield page
    page.evaluate(SET, [NEWER, False])


def press_button(page: Page) -> None:
    """Press the node's button where it is drawn, as a user does."""
    newer = page.locator("[data-node-id='2'] button", has_text=BUTTON)
    if newer.count():
        newer.click()
    else:
        place = page.evaluate(
            """name => {
              const node = window.app.graph.nodes[1], widget = node.widgets.find(each => each.name === name);
              const [x, y] = [node.pos[0] + node.size[0] / 2, node.pos[1] + widget.y + 10], ds = window.app.canvas.ds;
              const box = window.app.canvas.canvas.getBoundingClientRect();
              return [(x + ds.offset[0]) * ds.scale + box.left, (y + ds.offset[1]) * ds.scale + box.top];
            }""",
            BUTTON,
        )
        page.mouse.click(*place)
    page.wait_for_selector(".aclora-browser article")


def test_the_panel_shows_all_images_in_pages(graph: Page) -> None:
    press_button(graph)
    panel = graph.locator(".aclora-browser")
    assert panel.locator("h2").inner_text() == f"browsed · {IMAGES} images"
    assert panel.locator("article").count() == 24
    graph.wait_for_function("() => document.querySelector('.aclora-browser img').naturalWidth > 0")
    assert "96 × 64 pixels, learned at 80 × 48" in panel.locator("article").first.inner_text()
    panel.get_by_role("button", name="Next").click()
    assert panel.locator("article").count() == IMAGES - 24
    assert panel.get_by_role("button", name="Next").is_disabled()
    graph.keyboard.press("Escape")
    panel.wait_for(state="detached")


def test_captions_are_edited_in_the_panel(graph: Page, folder: Path) -> None:
    press_button(graph)
    panel = graph.locator(".aclora-browser")
    caption = panel.get_by_label("Caption of 0.png")
    assert caption.input_value() == "image 0"
    caption.fill("a new caption")
    panel.get_by_role("button", name="Save", exact=True).click()
    panel.get_by_text("Saved in 0.txt").wait_for()
    assert (folder / "0.txt").read_text(encoding="utf-8") == "a new caption\n"
    assert (folder / "0.txt.bak").read_text(encoding="utf-8") == "image 0"
    (folder / "1.txt").write_text("changed elsewhere", encoding="utf-8")
    panel.get_by_label("Caption of 1.png").fill("mine")
    panel.get_by_role("button", name="Save", exact=True).click()
    panel.get_by_text("1.txt has changed since it was shown here").wait_for()
    assert (folder / "1.txt").read_text(encoding="utf-8") == "changed elsewhere"
    graph.keyboard.press("Escape")  # what is not saved is not lost unasked
    panel.get_by_text("1 caption is not saved").wait_for()
    panel.get_by_role("button", name="Discard").click()
    panel.wait_for(state="detached")


def test_what_is_typed_stays_when_the_page_is_turned_and_all_is_saved_at_once(graph: Page, folder: Path) -> None:
    press_button(graph)
    panel = graph.locator(".aclora-browser")
    panel.get_by_label("Caption of 2.png").fill("second")
    panel.get_by_role("button", name="Next").click()
    panel.get_by_label("Caption of 29.png").fill("last")
    panel.get_by_role("button", name="Previous").click()
    assert panel.get_by_label("Caption of 2.png").input_value() == "second"
    panel.get_by_role("button", name="Save all").click()
    panel.get_by_role("button", name="Save all").wait_for(state="hidden")
    found = [(folder / f"{number}.txt").read_text(encoding="utf-8") for number in (2, 29)]
    assert found == ["second\n", "last\n"]
    graph.keyboard.press("Escape")
    panel.wait_for(state="detached")


def test_keys_pressed_in_the_panel_are_not_the_graphs(graph: Page) -> None:
    press_button(graph)
    graph.get_by_label("Caption of 0.png").focus()
    graph.keyboard.press("Control+Enter")  # would queue the graph
    graph.get_by_role("button", name="Reload").focus()
    graph.keyboard.press("Delete")
    graph.keyboard.press("Escape")
    queue = graph.evaluate("async () => (await (await window.app.api.fetchApi('/queue')).json())")
    assert queue == {"queue_running": [], "queue_pending": []}
    assert graph.evaluate("() => window.app.graph.nodes.length") == 2


def test_the_node_is_run_alone_and_shows_its_images(graph: Page) -> None:
    graph.evaluate("() => window.app.canvas.selectNode(window.app.graph.nodes[1])")
    graph.get_by_label("Execute to selected output nodes").click()
    graph.wait_for_function("() => window.app.nodeOutputs['2']?.images?.length === 2")  # sheets of fifteen


def test_beginners_meet_few_rows(graph: Page, request: pytest.FixtureRequest) -> None:
    newer = request.node.callspec.params["graph"] == "Nodes 2.0"
    if newer:
        shown = graph.locator("[data-node-id='2']").inner_text()
        assert "trigger_word" in shown and "shuffles" not in shown
    else:
        rows = ["folder", "resolution", "trigger_word", BUTTON, "Show advanced inputs"]
        assert graph.evaluate(VISIBLE_ROWS) == rows
        graph.evaluate("() => window.app.graph.nodes[1].widgets.at(-1).callback()")
        assert len(graph.evaluate(VISIBLE_ROWS)) == len(rows) + 11
    from tests.support.browser import api_form

    sent = api_form(graph)["2"]["inputs"]
    assert sent["prompt_syntax"] is False and sent["cache"] is True and len(sent) == 16


def test_a_workflow_that_changes_an_advanced_input_shows_it(graph: Page) -> None:
    workflow = graph.evaluate("() => window.app.graph.serialize()")
    assert workflow["nodes"][1]["widgets_values"][:5] == ["browsed", 64, "ink", True, False]
    workflow["nodes"][1]["widgets_values"][4] = True  # flip
    from tests.support.browser import load_workflow

    load_workflow(graph, workflow)
    assert "flip" in graph.evaluate(VISIBLE_ROWS)
