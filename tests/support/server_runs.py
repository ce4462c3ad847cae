"""Helpers for runs in a server: waiting, and reading their outputs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.support.host_server import HostServer


def until(condition: Callable[[], bool], what: str, patience: float = 60) -> None:
    """Wait until the condition holds."""
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end, f"{what} did not come"
        time.sleep(0.01)


def adapter(server: HostServer, file: str) -> dict[str, torch.Tensor]:
    return load_file(server.base / "models" / "loras" / f"{file}.safetensors")


def was_cached(history: dict[str, Any], node: str) -> bool:
    return any(kind == "execution_cached" and node in facts["nodes"] for kind, facts in history["status"]["messages"])


def checkpoints(server: HostServer, name: str) -> list[Path]:
    """Return the checkpoints of a training's first pass."""
    return sorted((server.base / "models" / "aclora_checkpoints" / name).glob("first_*"))


def titled(prompt: dict[str, Any], title: str) -> str:
    """Return the id of the node with this title."""
    (found,) = (node_id for node_id, node in prompt.items() if node["_meta"]["title"] == title)
    return found


def pixels(server: HostServer, finished: dict[str, Any], node: str) -> np.ndarray:
    """Return the image that a node saved, (height, width, 3) in 0..1."""
    (image,) = finished["outputs"][node]["images"]
    with Image.open(server.base / "output" / image["subfolder"] / image["filename"]) as picture:
        return np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
