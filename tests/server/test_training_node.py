"""Train AC-LoRA in a running ComfyUI: what it shows and keeps, cancels of several trainings, and errors."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError

import pytest
from PIL import Image

from tests.support import trouble
from tests.support.host_server import HostServer
from tests.support.server_runs import adapter, until, was_cached
from tests.support.trouble import DATASET, SAVE, TRAIN, Browser, says
from tools.front_end import NEWER, RUN, SET

if TYPE_CHECKING:
    from playwright.sync_api import Page

NODE, FOLDER = "4", "2"  # in the front end node ids are numbers
OPEN_WORKFLOW = "window.app.extensionManager.workflow.activeWorkflow.path"
COMMAND = "name => window.app.extensionManager.command.execute(name)"
IMAGES = "id => (window.app.nodeOutputs[id]?.images ?? []).map(each => each.subfolder + '/' + each.filename)"
# The height of the picture's letters as they are shown at 100 %, in classic nodes and in Nodes 2.0.
LETTERS = """id => {
  const node = window.app.graph.getNodeById(id);
  const image = document.querySelector(`[data-node-id="${id}"] [data-testid=main-image]`);
  const drawn = node.widgets.find(each => each.name === "$$canvas-image-preview")?.computedHeight;
  const [width, height] = image ? [image.clientWidth, image.clientHeight] : [node.size[0], drawn];
  const {naturalWidth, naturalHeight} = image ?? node.imgs?.[0] ?? {};
  return 21 * Math.min(width / naturalWidth, height / naturalHeight);
}"""
# The file of the image that a node shows large; null where it shows several small ones.
LARGE = """id => {
  const node = window.app.graph.getNodeById(id), element = document.querySelector(`[data-node-id="${id}"]`);
  const shown = element ? element.querySelector("[data-testid=main-image]") : node.imgs?.[node.imageIndex];
  return shown ? new URL(shown.src).searchParams.get("filename") : null;
}"""
LIVE = "id => window.app.nodePreviewImages[id]?.length ?? 0"


def numbered(prompt: dict[str, Any]) -> dict[str, Any]:
    """Return a prompt with the numbers that the front end gives its nodes."""
    ids = {"base": "1", DATASET: FOLDER, "plain": "3", TRAIN: NODE, SAVE: "5", "previews": "6"}
    renamed = {ids[name]: {**node, "inputs": dict(node["inputs"])} for name, node in prompt.items()}
    for node in renamed.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                node["inputs"][name] = [ids[value[0]], value[1]]
        node["_meta"] = {"title": node["class_type"]}
    return renamed


# ---- without a browser


def two_trainings(server: HostServer, file: str, steps: int) -> dict[str, Any]:
    """Return the prompt of two trainings on one dataset, each saved."""
    first, second = (trouble.prompt(server, f"{file}_{seed}", steps=steps, seed=seed) for seed in (1, 2))
    second["save 2"] = {**second.pop(SAVE)}
    second["save 2"]["inputs"]["lora_model"] = ["train 2", 1]
    second["train 2"] = second.pop(TRAIN)
    return {**second, **first}


def test_one_cancel_ends_all_trainings_of_a_run_and_the_next_run_trains_them(server: HostServer) -> None:
    client, queued = uuid.uuid4().hex, two_trainings(server, "both", 12 * server.pace)
    with Browser(server, client) as browser:
        run = server.post_json("/prompt", {"prompt": queued, "client_id": client})["prompt_id"]
        until(lambda: any(name.startswith("train") and value >= 1 for name, value in browser.progress), "a training")
        server.post_json("/interrupt", {"prompt_id": run})
        history = server.wait(run)
    assert history["status"]["status_str"] == "success"
    told = sorted(says(history, node) for node in (TRAIN, "train 2"))
    assert told[0].startswith("Cancelled at step") and told[0].count("Run again to train from the start.") == 1
    assert told[1] == "Not trained, as this run was cancelled before. Run again to train."
    saved = [file for file in ("both_1", "both_2") if (server.base / f"models/loras/{file}.safetensors").exists()]
    assert len(saved) == 1 and adapter(server, saved[0])
    again = server.run(queued)
    assert not was_cached(again, TRAIN) and not was_cached(again, "train 2")
    assert adapter(server, "both_1") and adapter(server, "both_2")
    assert was_cached(server.run(queued), TRAIN)


def test_the_picture_of_a_training_is_in_the_output_folder_and_comes_again_from_the_cache(server: HostServer) -> None:
    queued = trouble.prompt(server, "pictured", steps=2, seed=8)
    first = server.run(queued)["outputs"][TRAIN]["images"]
    assert [image["type"] for image in first] == ["output"] and first[0]["subfolder"] == "aclora"
    with Image.open(server.base / "output" / "aclora" / first[0]["filename"]) as picture:
        assert picture.width == 768 and "prompt" in picture.info  # dropped onto ComfyUI it opens its workflow
    again = server.run(queued)
    assert was_cached(again, TRAIN) and again["outputs"][TRAIN]["images"] == first


@pytest.mark.parametrize(
    ("node", "wrong", "input_name"),
    [(DATASET, {"folder": "nowhere"}, "folder"), (DATASET, {"regularisation": "nowhere"}, "regularisation")],
)
def test_a_wrong_folder_is_one_error_at_one_input(
    server: HostServer, node: str, wrong: dict[str, Any], input_name: str
) -> None:
    queued = trouble.prompt(server, "wrong")
    queued[node]["inputs"].update(wrong)
    with pytest.raises(HTTPError) as refusal:
        server.post_json("/prompt", {"prompt": queued})
    errors = json.loads(refusal.value.read())["node_errors"]
    assert list(errors) == [node]
    (error,) = errors[node]["errors"]
    assert error["extra_info"]["input_name"] == input_name and "nowhere" in error["details"]


# ---- in the front end


@pytest.fixture(scope="module")
def page(server: HostServer) -> Iterator[Page]:
    """The front end, open in a browser."""
    pytest.importorskip("playwright", reason="playwright is not installed: pip install -r tests/requirements.txt")
    from tests.support.browser import MISSING, find_browser, open_front_end

    if find_browser() is None:
        pytest.skip(f"the front end is not tested, as {MISSING}")
    with open_front_end(server.server.address) as opened:
        yield opened
        opened.evaluate(SET, [NEWER, False])


@pytest.fixture(params=["classic", "Nodes 2.0"])
def kind(request: pytest.FixtureRequest, page: Page) -> str:
    page.evaluate(SET, [NEWER, request.param == "Nodes 2.0"])
    return str(request.param)


def run_to_its_end(page: Page) -> None:
    page.evaluate(RUN)
    page.wait_for_function("() => window.ended === 2")


def test_what_a_training_showed_comes_back_after_a_change_of_tab_and_a_reload(
    page: Page, kind: str, server: HostServer
) -> None:
    from tests.support.browser import FIT_VIEW, open_prompt, text_on_node, wait_until_ready

    open_prompt(page, numbered(trouble.prompt(server, "shown", steps=2, seed=len(kind))), kind)
    run_to_its_end(page)
    page.wait_for_function(f"id => ({IMAGES})(id).length > 0", arg=NODE)
    images, text = page.evaluate(IMAGES, NODE), text_on_node(page, NODE)
    assert len(images) == 1 and images[0].startswith("aclora/training_") and text.startswith("It learned nothing")
    assert page.evaluate(LIVE, NODE) == 0  # the last live image would hide the picture
    width, height = page.evaluate("id => [...window.app.graph.getNodeById(id).size]", NODE)
    assert width >= 420 and height >= 860  # a new node's
    page.evaluate(FIT_VIEW)  # Nodes 2.0 lay out only what is seen
    page.wait_for_function(f"id => ({LETTERS})(id) >= 9", arg=NODE)

    own = page.evaluate(f"() => {OPEN_WORKFLOW}")
    page.evaluate(COMMAND, "Workspace.PreviousOpenedWorkflow")
    page.wait_for_function(f"own => {OPEN_WORKFLOW} !== own", arg=own)
    page.evaluate(COMMAND, "Workspace.NextOpenedWorkflow")
    page.wait_for_function(f"own => {OPEN_WORKFLOW} === own", arg=own)
    page.wait_for_function(f"id => ({IMAGES})(id).length > 0", arg=NODE)
    assert page.evaluate(IMAGES, NODE) == images and text_on_node(page, NODE) == text

    page.reload()
    wait_until_ready(page)
    page.wait_for_function(f"id => ({IMAGES})(id).length > 0", arg=NODE)
    assert page.evaluate(IMAGES, NODE) == images and text_on_node(page, NODE) == text


def test_with_previews_the_picture_is_large_and_the_sheet_is_the_second_image(
    page: Page, kind: str, server: HostServer
) -> None:
    from tests.support.browser import FIT_VIEW, open_prompt

    queued = trouble.prompt(server, "previewed", steps=2, seed=30 + len(kind))
    links = {"options": ["plain", 0], "clip": ["base", 1], "vae": ["base", 2]}
    queued["previews"] = server.node("ACLoRAPreviewOptions", preview_prompts="a cat", preview_every=1, **links)
    queued[TRAIN]["inputs"]["options"] = ["previews", 0]
    open_prompt(page, numbered(queued), f"{kind} previews")
    page.evaluate(FIT_VIEW)
    run_to_its_end(page)
    page.wait_for_function(f"id => ({IMAGES})(id).length === 2", arg=NODE)
    picture, sheet = page.evaluate(IMAGES, NODE)
    assert sheet.endswith("/sheet.png")
    page.wait_for_function(f"([id, file]) => ({LARGE})(id) === file", arg=[NODE, picture.split("/")[-1]])


def test_an_error_stands_on_its_node_until_it_runs_again(page: Page, kind: str, server: HostServer) -> None:
    from tests.support.browser import open_prompt, text_on_node

    queued = numbered(trouble.prompt(server, "told", steps=2))
    queued[FOLDER]["inputs"]["more_resolutions"] = "big"
    open_prompt(page, queued, f"{kind} error")
    run_to_its_end(page)
    told = text_on_node(page, FOLDER)
    assert told.startswith("⚠ more_resolutions has to be whole numbers") and 'but one is "big"' in told
    assert not text_on_node(page, NODE)
    mend = "id => { window.app.graph.getNodeById(id).widgets.find(w => w.name === 'more_resolutions').value = ''; }"
    page.evaluate(mend, FOLDER)
    run_to_its_end(page)
    assert "⚠" not in text_on_node(page, FOLDER) and text_on_node(page, NODE).startswith("It learned nothing")
