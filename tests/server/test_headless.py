"""Workflows without a server: the parts of `python3 run.py train`, and its command, in the real ComfyUI."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from launcher.environment import ROOT
from launcher.host import link_pack
from launcher.workflow import to_prompt
from tests.support.host_server import HostServer
from tests.support.server_runs import until
from tests.support.workflow_variants import in_subgraph, plain, variants
from tools.workflow_files import FILES, read_workflow

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.slow
PATIENCE = 300  # seconds
SUBGRAPHS = {
    "subgraph": in_subgraph(),
    "subgraph with a seed outside": in_subgraph(seed=55),
    "bypassed subgraph": in_subgraph(mode=4),
    "muted subgraph": in_subgraph(mode=2),
}
VARIANTS = {**variants(), **SUBGRAPHS}


@pytest.fixture(scope="module")
def definitions(server: HostServer) -> dict[str, Any]:
    return dict(server.get_json("/object_info"))


@pytest.mark.parametrize("name", FILES)
def test_shipped_workflows_become_what_the_front_end_sends(name: str, definitions: dict[str, Any]) -> None:
    """tests/prompts holds what it sends (test_frontend.py)."""
    sent = json.loads((ROOT / "tests" / "prompts" / f"{name}.json").read_text(encoding="utf-8"))
    assert to_prompt(read_workflow(name), definitions) == sent


@pytest.mark.parametrize("name", VARIANTS)
def test_a_workflow_becomes_what_the_front_end_sends(name: str, definitions: dict[str, Any], page: Page) -> None:
    from tests.support.browser import api_form

    page.evaluate("workflow => window.app.loadGraphData(workflow)", VARIANTS[name])
    page.wait_for_timeout(500)
    assert to_prompt(VARIANTS[name], definitions) == api_form(page)


class Base:
    """A folder for a ComfyUI without a server, and the command that runs a workflow in it."""

    def __init__(self, host: Path, folder: Path, prefix: list[str] | None = None) -> None:
        for part in ("input", "output", "user", "models/loras"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        link_pack(folder / "custom_nodes")
        self.host, self.folder, self.prefix = host, folder, prefix or [sys.executable]

    def start(self, workflow: dict[str, Any], *settings: str) -> subprocess.Popen[str]:
        """Start the command, whose output is stdout."""
        file = self.folder / "workflow.json"
        file.write_text(json.dumps(workflow), encoding="utf-8")
        command = [*self.prefix, str(ROOT / "launcher" / "headless.py"), str(self.host), str(file)]
        command += ["--messages", str(self.folder / "train.log")]
        for setting in settings:
            command += ["--set", setting]
        command += ["--", "--cpu", "--base-directory", str(self.folder), "--disable-api-nodes"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, workflow: dict[str, Any], *settings: str) -> tuple[int, str]:
        """Return the exit code and the output."""
        process = self.start(workflow, *settings)
        output, _ = process.communicate(timeout=PATIENCE)
        return process.returncode, output

    def adapters(self) -> list[Path]:
        return sorted((self.folder / "models" / "loras").rglob("*.safetensors"))


@pytest.fixture
def base(host: Path, tmp_path: Path) -> Base:
    return Base(host, tmp_path)


def small(steps: int = 4) -> dict[str, Any]:
    """The plain workflow with few steps, without its drawings."""
    workflow = plain()
    for node in workflow["nodes"]:
        if node["type"] in ("KSampler", "ImageGrid", "SaveImage"):
            node["mode"] = 2
        if node["type"] == "ACLoRATrain":
            node["widgets_values"][0] = steps
    return workflow


SHARED = ("ACLoRATrain.steps=3", "ACLoRASave.precision=fp32")  # settings of one process and of two


@pytest.fixture(scope="module")
def alone(host: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, str]:
    """The folder and the output of a run of one process, with drawings."""
    base = Base(host, tmp_path_factory.mktemp("alone"))
    settings = (*SHARED, "ACLoRATrain.batch_size=4", "16.steps=1", "20.steps=1", "5.filename=mine")
    code, output = base.run(plain(), *settings)
    assert code == 0, output
    return base, output


def test_it_trains_and_says_where_the_adapter_and_the_images_are(alone: tuple[Base, str]) -> None:
    base, output = alone
    (adapter,) = base.adapters()
    assert adapter.name == "mine_00001.safetensors" and str(adapter) in output
    with safe_open(adapter, framework="np") as file:
        assert file.metadata()["ss_steps"] == "3"
    images = sorted((base.folder / "output" / "aclora").glob("*.png"))
    assert [image.name.split("_")[0] for image in images] == ["after", "before", "training"]
    assert all(str(image) in output for image in images)
    assert "3 steps on 24 images" in output and "Logging error" not in output


@pytest.mark.parametrize(
    ("settings", "sentences"),
    [
        (
            ["ACLoRADataset.folder=nowhere", "ACLoRATrain.max_rank=2000"],
            ['Load AC-LoRA Dataset: The folder "nowhere" does not exist.', "Value 2000 bigger than max of 1024"],
        ),
        (["ACLoRATrain.max_rank=1000"], ["The maximum rank is 1000, but the model's largest layer can only have rank"]),
        (["ACLoRATrain.rank=4"], ["The node 'ACLoRATrain' has no input 'rank'. It has batch_size,"]),
    ],
    ids=["the node's check and ComfyUI's", "while it runs", "setting"],
)
def test_a_failure_ends_with_the_sentences_of_the_nodes(base: Base, settings: list[str], sentences: list[str]) -> None:
    code, output = base.run(small(), *settings)
    assert code == 1 and "Traceback" not in output, output
    assert all(sentence in output for sentence in sentences), output
    assert base.adapters() == []


def ended(process: subprocess.Popen[str], seen: Callable[[], bool], signals: int) -> tuple[int, str]:
    """Send Ctrl-C once something is seen, so many times, and return the exit code and the output."""
    assert process.stdout is not None
    output, late = "", threading.Timer(2 * PATIENCE, process.kill)
    late.start()
    try:
        until(seen, "the training", PATIENCE)
        process.send_signal(signal.SIGINT)
        for _ in range(signals - 1):
            for line in process.stdout:  # two signals that come at once are one
                output += line
                if "Once more ends at once." in line:
                    break
            process.send_signal(signal.SIGINT)
        output += process.stdout.read()
        process.wait(PATIENCE)
    finally:
        late.cancel()
        process.kill()
        process.stdout.close()
    return process.returncode, output


def with_options(workflow: dict[str, Any], kind: str, widgets: list[Any]) -> dict[str, Any]:
    """Return the workflow with an options node in front of its training."""
    train = next(node for node in workflow["nodes"] if node["type"] == "ACLoRATrain")
    options = {"id": 700, "type": kind, "mode": 0, "inputs": [], "widgets_values": widgets}
    options["outputs"] = [{"name": "options", "type": "ACLORA_OPTIONS", "links": [700]}]
    train["inputs"].append({"name": "options", "type": "ACLORA_OPTIONS", "link": 700})
    workflow["nodes"].append(options)
    workflow["links"].append([700, 700, 0, train["id"], len(train["inputs"]) - 1, "ACLORA_OPTIONS"])
    return workflow


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send Ctrl-C to one process")
def test_ctrl_c_keeps_what_was_learned_and_the_next_run_resumes(base: Base) -> None:
    workflow = with_options(small(3000), "ACLoRACheckpointOptions", [2, "mine", 2])
    checkpoints = base.folder / "models" / "aclora_checkpoints" / "mine"

    def saved() -> bool:
        return any(checkpoints.glob("first_*"))

    code, output = ended(base.start(workflow), saved, 1)
    assert code == 130 and "Cancelled at step" in output, output
    assert len(base.adapters()) == 1 and str(base.adapters()[0]) in output

    reached = max(path.name for path in checkpoints.glob("first_*"))

    def saved_more() -> bool:
        return max((path.name for path in checkpoints.glob("first_*")), default="") > reached

    code, output = ended(base.start(workflow), saved_more, 2)  # one that began anew would have to get there first
    assert code == 130 and "Stopped." in output, output
    assert len(base.adapters()) == 1


def torchrun(size: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]


def factors(adapter: Path) -> dict[str, torch.Tensor]:
    return load_file(adapter)


def test_two_processes_train_the_adapter_that_one_trains_with_twice_the_batch(
    alone: tuple[Base, str], host: Path, tmp_path: Path
) -> None:
    """Each encodes a part of the images, and the first one writes."""
    one, two = alone[0], Base(host, tmp_path, torchrun(2))
    code, output = two.run(small(), *SHARED, "ACLoRATrain.batch_size=2")
    assert code == 0 and "2 processes train together" in output, output
    (by_one,), (together,) = one.adapters(), two.adapters()
    assert str(together) in output
    expected, found = factors(by_one), factors(together)
    assert found.keys() == expected.keys()
    deltas = [(found[f"{name}.lora_up.weight"], found[f"{name}.lora_down.weight"]) for name in layer_names(found)]
    wanted = [(expected[f"{name}.lora_up.weight"], expected[f"{name}.lora_down.weight"]) for name in layer_names(found)]
    for (up, down), (other_up, other_down) in zip(deltas, wanted, strict=True):
        delta, other = up.flatten(1) @ down.flatten(1), other_up.flatten(1) @ other_down.flatten(1)
        assert (delta - other).norm() <= 1e-3 * other.norm()
    with safe_open(together, framework="np") as file:
        assert file.metadata()["ss_total_batch_size"] == "4"


def layer_names(weights: dict[str, torch.Tensor]) -> list[str]:
    return sorted({name.removesuffix(".lora_up.weight") for name in weights if name.endswith(".lora_up.weight")})


def test_gpus_in_a_workflow_start_processes_without_torchrun(base: Base) -> None:
    workflow = with_options(small(), "ACLoRASpeedOptions", ["automatic", True, 0.0, "2"])
    code, output = base.run(workflow)
    assert code == 0 and "Trained on 2 processes on the CPU" in output, output
    assert len(base.adapters()) == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_process_ends_the_others_with_a_sentence(host: Path, tmp_path: Path) -> None:
    base = Base(host, tmp_path, torchrun(2))
    process = base.start(small(3000))
    second = tmp_path / "train-2.log"
    try:
        until(lambda: second.is_file() and "processes take" in second.read_text(), "the training", PATIENCE)
        (victim,) = [child for child in psutil.Process(process.pid).children() if str(1) == child.environ()["RANK"]]
        began = time.monotonic()
        victim.kill()
        output, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode not in (0, 130) and time.monotonic() - began < 60  # 30 on a machine that is not busy
    assert "Another process of this training has ended" in output, output
    assert base.adapters() == []


def test_a_failure_of_one_process_is_told_once_with_its_reason(host: Path, tmp_path: Path) -> None:
    base = Base(host, tmp_path, torchrun(2))
    code, output = base.run(small(), "ACLoRATrain.max_rank=1000")
    assert code == 1 and output.count("The maximum rank is 1000") == 2, output  # both fail alike, and say so
