"""The quickstart workflow, as `python3 run.py quickstart` sends it to the server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from launcher.environment import ROOT
from tests.support.host_server import HostServer

pytestmark = pytest.mark.slow
PROMPT = ROOT / "tests" / "prompts" / "quickstart.json"
PATIENCE = 600  # seconds; three minutes on two cores, and other machines are slower


@pytest.fixture(scope="module")
def prompt() -> dict[str, Any]:
    """Return the API form of workflows/quickstart.json."""
    return dict(json.loads(PROMPT.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def older_adapters(server: HostServer) -> set[Path]:
    """The adapters that other tests saved before."""
    return adapters(server)


@pytest.fixture(scope="module")
def finished(server: HostServer, prompt: dict[str, Any], older_adapters: set[Path]) -> dict[str, Any]:
    """The history of the quickstart, run once for all tests here."""
    return server.run(prompt, timeout=PATIENCE)


def adapters(server: HostServer) -> set[Path]:
    """Return the files in the server's models/loras."""
    return set((server.base / "models" / "loras").rglob("*.safetensors"))


def nodes_of(prompt: dict[str, Any], kind: str) -> list[str]:
    """Return the ids of the nodes of a class."""
    return [node_id for node_id, node in prompt.items() if node["class_type"] == kind]


def pixels(path: Path) -> np.ndarray:
    """Read an image as floats in 0..1."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float32) / 255


def named(images: list[Path], word: str) -> list[Path]:
    """Return the images with this word in their name, in order."""
    return sorted(path for path in images if word in path.name.lower())


def test_the_adapter_is_saved_in_the_loaders_folder(
    server: HostServer, finished: dict[str, Any], older_adapters: set[Path]
) -> None:
    (file,) = adapters(server) - older_adapters
    with safe_open(file, framework="np") as adapter:
        names, metadata = list(adapter.keys()), adapter.metadata()
    assert all(name.startswith("transformer.") and name.endswith(".weight") for name in names)
    assert "ss_network_module" in metadata


def test_the_style_changes_the_images(server: HostServer, finished: dict[str, Any]) -> None:
    images = server.images(finished)
    before, after = named(images, "before"), named(images, "after")
    assert before and len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        assert np.abs(pixels(old) - pixels(new)).mean() > 0.02, (old.name, new.name)


def test_images_are_not_blank(server: HostServer, finished: dict[str, Any]) -> None:
    for path in server.images(finished):
        assert pixels(path).std() > 0.02, path.name


def test_the_images_before_are_drawn_before_the_training(server: HostServer, finished: dict[str, Any]) -> None:
    """Else an artist waits for minutes without seeing what there is to change."""
    (before,) = named(server.images(finished), "before")
    kept = (server.base / "temp" / "aclora_candidates").glob("*/*")  # one folder for each training
    (*_, training) = sorted(kept, key=lambda folder: folder.stat().st_mtime)
    assert before.stat().st_mtime < min(file.stat().st_mtime for file in training.iterdir())


def test_a_second_run_trains_nothing(server: HostServer, prompt: dict[str, Any], finished: dict[str, Any]) -> None:
    again = server.run(prompt, timeout=PATIENCE)
    cached = next(data["nodes"] for kind, data in again["status"]["messages"] if kind == "execution_cached")
    costly = [node for kind in ("ACLoRADataset", "ACLoRATrain", "KSampler") for node in nodes_of(prompt, kind)]
    assert costly and set(costly) <= set(cached)
