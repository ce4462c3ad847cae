"""The other workflows: those on the tiny base run; those for large models are accepted by the server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any
from urllib.error import HTTPError

import numpy as np
import pytest
from safetensors import safe_open

from aclora_core.adapter import lora_file as adapter_file
from aclora_core.adapter.rank_report import RankReport
from launcher.environment import ROOT
from tests.support.host_server import HostServer
from tests.support.server_runs import checkpoints, pixels, titled, until
from tools.workflow_files import WORKFLOWS, nodes_of, read_workflow

pytestmark = pytest.mark.slow
PROMPTS = ROOT / "tests" / "prompts"
LARGE = ("sd15", "sdxl", "flux", "z_image", "qwen_image", "caption_my_folder")
FOLDERS = {
    "ckpt_name": "checkpoints",
    "unet_name": "diffusion_models",
    "vae_name": "vae",
    "clip_name": "text_encoders",
    "clip_name1": "text_encoders",
    "clip_name2": "text_encoders",
}


def prompt(name: str, **settings: Any) -> dict[str, Any]:
    """Return the API form of a workflow, with few sampling steps and these training settings."""
    nodes = dict(json.loads((PROMPTS / f"{name}.json").read_text(encoding="utf-8")))
    for node in nodes.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 3
        if node["class_type"] == "ACLoRATrain":
            node["inputs"] |= settings
    return nodes


@pytest.mark.parametrize("name", ["quickstart", *LARGE[:-1]])
def test_the_training_waits_for_the_images_before_and_both_are_compared(name: str) -> None:
    nodes = prompt(name)
    saved = {title: nodes[titled(nodes, title)]["inputs"]["images"] for title in ("Before", "After")}
    (training,) = (node["inputs"] for node in nodes.values() if node["class_type"] == "ACLoRATrain")
    compared = nodes[titled(nodes, "Before and after")]
    assert training["before"] == saved["Before"] and compared["class_type"] == "ImageCompare"
    assert [compared["inputs"][side] for side in ("image_a", "image_b")] == list(saved.values())


def model_files(nodes: dict[str, Any]) -> set[tuple[str, str, str]]:
    """Return (node, input, file) of every model file that a workflow needs."""
    return {
        (node_id, name, node["inputs"][name])
        for node_id, node in nodes.items()
        for name in FOLDERS
        if name in node["inputs"]
    }


@pytest.fixture(params=LARGE)
def large(request: pytest.FixtureRequest, server: HostServer) -> dict[str, Any]:
    folder = server.base / "input" / "my_style"  # which caption_my_folder reads, before or after it loads its model
    folder.mkdir(exist_ok=True)
    shutil.copy(next((WORKFLOWS / "example_pictures").rglob("*.png")), folder)
    return prompt(request.param)


@pytest.fixture
def empty_files(server: HostServer, large: dict[str, Any]) -> Iterator[None]:
    """Empty files with the models' names, so that the server accepts the workflow."""
    paths = {server.base / "models" / FOLDERS[name] / file for _, name, file in model_files(large)}
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(exist_ok=False)
    yield
    for path in paths:
        path.unlink()


def test_without_the_files_the_server_reports_only_that_they_are_missing(
    server: HostServer, large: dict[str, Any]
) -> None:
    with pytest.raises(HTTPError) as refusal:
        server.post_json("/prompt", {"prompt": large})
    refused = json.loads(refusal.value.read())["node_errors"]
    errors = [(node_id, error) for node_id, facts in refused.items() for error in facts["errors"]]
    assert {error["type"] for _, error in errors} == {"value_not_in_list"}
    places = [(node_id, error["extra_info"]) for node_id, error in errors]
    assert {(node_id, place["input_name"], place["received_value"]) for node_id, place in places} == model_files(large)


def test_with_the_files_the_server_accepts_it_and_starts_to_load(
    server: HostServer, large: dict[str, Any], empty_files: None
) -> None:
    history = server.wait(server.submit(large))
    (failure,) = (facts for kind, facts in history["status"]["messages"] if kind == "execution_error")
    assert failure["node_id"] in {node_id for node_id, _, _ in model_files(large)}


def test_the_note_and_the_front_end_link_to_the_files(large: dict[str, Any], request: pytest.FixtureRequest) -> None:
    nodes = nodes_of(read_workflow(request.node.callspec.params["large"]))
    offered = {(m["name"], m["directory"]): m["url"] for node in nodes for m in node["properties"].get("models", ())}
    assert offered.keys() == {(file, FOLDERS[name]) for _, name, file in model_files(large)}
    (note,) = (node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote")
    for (file, _), url in offered.items():
        assert f"[{file}]({url})" in note


@pytest.fixture(scope="module")
def compared(server: HostServer) -> tuple[dict[str, Any], dict[str, Any]]:
    """The prompt of compare_ranks, and the history of a short run of it."""
    nodes = prompt("compare_ranks", steps=16, batch_size=2)
    return nodes, server.run(nodes, timeout=300)


def saved(server: HostServer, name: str) -> tuple[set[int], RankReport]:
    """Return the ranks in a file of compare_ranks, and its report."""
    path = server.base / "models" / "loras" / "aclora" / f"{name}.safetensors"
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    ranks = {layer.rank for layer in adapter_file.load(path).layers.values()}
    return ranks, RankReport.from_json(metadata["aclora.trajectory"])


def test_plain_loras_have_the_configured_rank_in_every_layer(server: HostServer, compared: object) -> None:
    for rank in (1, 32):
        ranks, report = saved(server, f"rank_{rank}")
        assert ranks == {rank} and report.settings["mode"] == "off"
        assert len(report.losses) == 16 and not report.validation and not report.restarts


def test_ac_lora_truncates_each_layer_to_the_rank_that_it_uses(server: HostServer, compared: object) -> None:
    ranks, report = saved(server, "ac")
    assert len(report.losses) == 16 and report.settings["smallest"]
    assert max(ranks) <= 32 and len(ranks) > 1


def test_all_are_trained_for_the_same_steps_and_give_different_images(
    server: HostServer, compared: tuple[dict, dict]
) -> None:
    nodes, history = compared
    trainings = [node["inputs"] for node in json.loads((PROMPTS / "compare_ranks.json").read_text("utf-8")).values()]
    assert [each["steps"] for each in trainings if "max_rank" in each] == [560] * 3
    titles = ("A plain LoRA of rank 1", "A plain LoRA of rank 32", "AC-LoRA: rank 32 at most")
    drawn = [pixels(server, history, titled(nodes, title)) for title in titles]
    assert min(image.std() for image in drawn) > 0.02
    assert min(np.abs(drawn[i] - drawn[j]).mean() for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-4


def test_evaluate_measures_unseen_images_with_and_without_the_lora(server: HostServer) -> None:
    nodes = prompt("evaluate", steps=12, batch_size=2)
    history = server.run(nodes, timeout=300)
    (evaluate,) = (node_id for node_id, node in nodes.items() if node["class_type"] == "ACLoRAEvaluate")
    shown, table = history["outputs"][evaluate], history["outputs"][titled(nodes, "The numbers as a table")]
    (text,) = table["text"]
    assert text.startswith(shown["text"][0].splitlines()[0])
    assert "12 drawn, 12 references, 12 base, 24 training" in text and "Features: denoiser, joint_blocks.1" in text
    assert "similarity to its own reference" in text and "No copies of training images among 12 images." in text
    assert pixels(server, history, titled(nodes, "The nearest images")).std() > 0.1


def test_resume_continues_after_a_cancel_and_for_more_steps(server: HostServer) -> None:
    steps = 26
    nodes = prompt("resume", steps=steps, batch_size=2, layers="attention")
    train, drawn = titled(nodes, "Train AC-LoRA"), titled(nodes, "What it has learned so far")
    prompt_id = server.submit(nodes)
    until(lambda: bool(checkpoints(server, "resume_example")), "a checkpoint")
    server.post_json("/interrupt", {"prompt_id": prompt_id})
    cancelled = server.wait(prompt_id)
    assert cancelled["status"]["status_str"] == "success"
    assert not cancelled["outputs"][train]["text"][0].startswith(f"{steps} steps")
    ended = server.run(nodes)
    assert ended["outputs"][train]["text"][0].startswith(f"{steps} steps")
    assert np.abs(pixels(server, cancelled, drawn) - pixels(server, ended, drawn)).mean() > 1e-4
    nodes[train]["inputs"]["steps"] = steps + 4
    nodes[titled(nodes, "AC-LoRA Checkpoint Options")]["inputs"]["resume"] = "for more steps"
    assert server.run(nodes)["outputs"][train]["text"][0].startswith(f"{steps + 4} steps")
    assert f"resumed at step {steps} of" in server.log.read_text(encoding="utf-8")
