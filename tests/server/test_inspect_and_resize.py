"""The workflow inspect_and_resize, run through the server on a LoRA like the quickstart's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import numpy as np
import pytest
import torch
from safetensors import safe_open

from aclora_core.adapter.adapter import Adapter, Layer
from aclora_core.adapter.lora_file import save
from aclora_core.adapter.metadata import build_metadata
from aclora_core.adapter.rank_report import RankReport, Restart
from aclora_core.adapter.truncation_loss import Truncation, TruncationLoss
from aclora_core.method.restart import LayerRank
from launcher.environment import ROOT
from tests.support.host_server import HostServer
from tests.support.server_runs import pixels, titled

PROMPT = ROOT / "tests" / "prompts" / "inspect_and_resize.json"
DENOISER = ROOT / "assets" / "tiny_base" / "denoiser.safetensors"
RANK = 16
SIZES = (0.6, 0.3, 0.1)  # megabytes; layers are left out for the last


@pytest.fixture(scope="module")
def prompt() -> dict[str, Any]:
    """Return the API form of workflows/inspect_and_resize.json, with few sampling steps."""
    nodes = dict(json.loads(PROMPT.read_text(encoding="utf-8")))
    for node in nodes.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 4
    return nodes


@pytest.fixture(scope="module")
def lora(server: HostServer, prompt: dict[str, Any]) -> Iterator[Path]:
    """The file that the workflow loads: layers of the tiny base whose singular values fall by a factor of 0.7."""
    (name,) = (node["inputs"]["lora_name"] for node in prompt.values() if node["class_type"] == "ACLoRALoad")
    path = server.base / "models" / "loras" / name
    before = path.read_bytes() if path.exists() else None
    generator = torch.Generator().manual_seed(0)
    with safe_open(DENOISER, framework="pt") as weights:
        shapes = {key: weights.get_slice(key).get_shape() for key in weights.keys() if key.endswith("weight")}
    layers = {}
    for key, shape in shapes.items():
        if "block.attn." in key and len(shape) == 2 or "mlp.fc" in key:
            up, down = (torch.linalg.qr(torch.randn(side, RANK, generator=generator)).Q for side in shape)
            sizes = 2.0 * 0.7 ** torch.arange(RANK)
            base = f"diffusion_model.{key.removesuffix('.weight')}"
            layers[base] = Layer((down * sizes).T.contiguous().half(), up.contiguous().half(), float(RANK))
    adapter = Adapter(layers)
    save(adapter, path, build_metadata(adapter, "ink", report_for(layers)))
    yield path
    path.unlink() if before is None else path.write_bytes(before)


def drawn(prompt: dict[str, Any], title: str) -> str:
    """Return the node with this title that saves images."""
    return node_of(prompt, "SaveImage", title)


def resizing(prompt: dict[str, Any], size: float) -> str:
    """Return the node that makes a LoRA of this size."""
    return node_of(prompt, "ACLoRAResize", f"At most {size} MB")


def node_of(prompt: dict[str, Any], kind: str, title: str) -> str:
    nodes = prompt.items()
    (found,) = (key for key, node in nodes if (node["class_type"], node["_meta"]["title"]) == (kind, title))
    return found


def report_for(layers: dict[str, Layer]) -> RankReport:
    kept = dict.fromkeys(layers, LayerRank(4, 4, 3, 0.9))
    restarts = [Restart(step, step, 0.5, 0.7, kept) for step in (10, 20)]
    truncations = [
        TruncationLoss(Truncation.from_name("rank 4"), 4.0, 10**6, 0.5, 0.01, False),
        TruncationLoss(Truncation.from_name("whole"), 16.0, 4 * 10**6, 0.49, 0.0, True),
    ]
    spectrum = {name: [1.0] for name in layers}
    return RankReport(
        {"steps": 30}, [0.5] * 30, [(30, 0.49)], restarts, spectrum, dict.fromkeys(layers, 3), truncations
    )


@pytest.fixture(scope="module")
def finished(server: HostServer, prompt: dict[str, Any], lora: Path) -> dict[str, Any]:
    """The history of the workflow, run once for all tests here."""
    return server.run(prompt, timeout=300)


def test_stronger_truncation_changes_the_images_more(
    server: HostServer, prompt: dict[str, Any], finished: dict[str, Any]
) -> None:
    titles = ("The whole LoRA", *(f"At most {size} MB" for size in SIZES))
    whole, *smaller = (pixels(server, finished, drawn(prompt, title)) for title in titles)
    assert min(image.std() for image in (whole, *smaller)) > 0.02
    distances = [np.abs(whole - image).mean() for image in smaller]
    assert 0.0 < distances[0] < distances[1] < distances[2]


def test_one_chart_and_tables_show_the_file_and_its_training(prompt: dict[str, Any], finished: dict[str, Any]) -> None:
    outputs = finished["outputs"]
    assert len(outputs[titled(prompt, "Inspect AC-LoRA")]["images"]) == 1
    says = outputs[titled(prompt, "What the file says")]["text"][0]
    assert "aclora/ink_00001.safetensors" in says and re.search(r"signal ranks +3 in every layer", says)
    table = outputs[titled(prompt, "The numbers as a table")]["text"][0]
    assert "validation loss" in table and "diffusion_model.joint_blocks.0.x_block.attn.qkv" in table


def test_each_size_is_kept_and_told_with_what_is_lost(prompt: dict[str, Any], finished: dict[str, Any]) -> None:
    for size in SIZES:
        text = finished["outputs"][resizing(prompt, size)]["text"][0]
        told = re.search(r"-> ([\d.]+) (k|M)B", text)
        assert told and float(told[1]) / (1000 if told[2] == "k" else 1) <= size
        assert (" dropped: 0." in text) == (size > 0.2)


def test_the_truncated_file_has_the_report_and_a_preview(
    server: HostServer, prompt: dict[str, Any], finished: dict[str, Any], lora: Path
) -> None:
    text = finished["outputs"][titled(prompt, "Save the LoRA of 0.6 MB")]["text"][0]
    path = server.base / "models" / "loras" / re.search(r"Saved (\S+):", text)[1]  # type: ignore[index]
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        ranks = {file.get_slice(key).get_shape()[1] for key in file.keys() if key.endswith("lora_up.weight")}
    preview = len(metadata["modelspec.thumbnail"])  # for which the rule leaves no room
    assert max(ranks) < RANK and path.stat().st_size - preview <= 1e6 * SIZES[0] < lora.stat().st_size
    assert RankReport.from_json(metadata["aclora.trajectory"]).settings == {"steps": 30}
    assert metadata["modelspec.thumbnail"].startswith("data:image/jpeg")
    path.unlink()


def test_without_the_quickstarts_file_the_error_says_to_run_it(server: HostServer, prompt: dict[str, Any]) -> None:
    early = json.loads(json.dumps(prompt).replace("ink_00001", "ink_09999"))
    with pytest.raises(HTTPError) as refusal:
        server.post_json("/prompt", {"prompt": early})
    errors = json.loads(refusal.value.read())["node_errors"]
    assert errors.keys() == {titled(prompt, "Load AC-LoRA")}
    (error,) = errors[titled(prompt, "Load AC-LoRA")]["errors"]
    assert "Run the quickstart workflow first: it makes it." in error["details"]
