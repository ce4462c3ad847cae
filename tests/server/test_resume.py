"""Checkpoints in the real server: cancel, crash, and ComfyUI's cache."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import trouble
from tests.support.host_server import HostServer, running
from tests.support.server_runs import adapter, checkpoints, until, was_cached
from tests.support.trouble import TRAIN, says

pytestmark = pytest.mark.slow
STEPS = 24


def prompt(server: HostServer, file: str, wished: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """Return the prompt of a short training on the tiny base, optionally with checkpoints."""
    found = trouble.prompt(server, file, **{"steps": STEPS} | settings)
    found["ranks"], last = server.node("ACLoRARankOptions", restart_every=2, options=["plain", 0]), "ranks"
    if wished:
        found["kept"], last = server.node("ACLoRACheckpointOptions", **wished, options=[last, 0]), "kept"
    found[TRAIN]["inputs"]["options"] = [last, 0]
    return found


def wait_for_checkpoint(server: HostServer, name: str) -> None:
    until(lambda: bool(checkpoints(server, name)), "a checkpoint")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resuming")


@pytest.fixture(scope="module")
def whole(host: Path, base: Path) -> dict[str, torch.Tensor]:
    """The adapter of an uninterrupted training; then a second server is killed during the same training."""
    with running(host, base, "first") as server:
        server.run(prompt(server, "whole"))
        server.submit(prompt(server, "crashed", {"checkpoint_every": 3, "checkpoint_name": "crashed"}))
        wait_for_checkpoint(server, "crashed")
        process = server.server.process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
        process.wait(30)
        return adapter(server, "whole")


@pytest.fixture(scope="module")
def server_after(host: Path, base: Path, whole: dict[str, torch.Tensor]) -> Iterator[HostServer]:
    with running(host, base, "second") as server:
        yield server


def assert_whole(found: dict[str, torch.Tensor], whole: dict[str, torch.Tensor]) -> None:
    assert found.keys() == whole.keys()
    for key, tensor in whole.items():
        assert torch.equal(found[key], tensor), key


def resumed_at(server: HostServer) -> list[int]:
    """Return the steps at which trainings were resumed, from the log."""
    return [int(step) for step in re.findall(r"resumed at step (\d+) of", server.log.read_text(encoding="utf-8"))]


def test_a_training_resumed_after_a_crash_gives_the_same_adapter(server_after: HostServer, whole) -> None:
    server = server_after
    assert not (server.base / "models" / "loras" / "crashed.safetensors").exists()
    settings = {"checkpoint_every": 3, "checkpoint_name": "crashed"}
    server.run(prompt(server, "crashed", settings))
    assert 0 < resumed_at(server)[-1] < STEPS
    assert_whole(adapter(server, "crashed"), whole)
    assert len(checkpoints(server, "crashed")) == 2
    again = server.run(prompt(server, "crashed", settings))
    assert was_cached(again, TRAIN) and len(resumed_at(server)) == 1


def test_a_cancelled_training_is_resumed_instead_of_cached(server_after: HostServer, whole) -> None:
    server = server_after
    before = len(resumed_at(server))
    queued = prompt(server, "cancelled", {"checkpoint_every": 3, "checkpoint_name": "styles/cancelled"})
    prompt_id = server.submit(queued)
    wait_for_checkpoint(server, "styles/cancelled")
    server.post_json("/interrupt", {"prompt_id": prompt_id})
    history = server.wait(prompt_id)
    assert history["status"]["status_str"] == "success" and not says(history).startswith(f"{STEPS} steps")
    part = adapter(server, "cancelled")
    history = server.run(queued)
    assert not was_cached(history, TRAIN) and says(history).startswith(f"{STEPS} steps")
    assert len(resumed_at(server)) == before + 1
    assert_whole(adapter(server, "cancelled"), whole)
    assert any(not torch.equal(part[key], tensor) for key, tensor in whole.items())
    assert was_cached(server.run(queued), TRAIN)


def test_a_changed_setting_is_refused_and_more_steps_resume(server_after: HostServer) -> None:
    server = server_after
    settings = {"checkpoint_every": 12, "checkpoint_name": "longer"}
    server.run(prompt(server, "longer", settings))
    history = server.wait(server.submit(prompt(server, "longer", settings, learning_rate=1e-3)))
    assert history["status"]["status_str"] == "error"
    told = str(history["status"]["messages"])
    assert "learning_rate was 0.0005 and is 0.001" in told and "another checkpoint name" in told
    more = server.run(prompt(server, "longer", settings | {"resume": "for more steps"}, steps=STEPS + 4))
    assert resumed_at(server)[-1] == STEPS and says(more).startswith(f"{STEPS + 4} steps")


REFUSED = {
    "../elsewhere": "leads outside models/aclora_checkpoints",
    "a:b": "extra_model_paths.yaml",
    "": "cannot be a file name on every system",
    str(Path(os.sep, "tmp", "here")): "extra_model_paths.yaml",
    "~nobody/x": "extra_model_paths.yaml",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_outside_the_folder_is_refused_before_the_training(server_after: HostServer, name: str) -> None:
    nodes = prompt(server_after, "bad", {"checkpoint_name": name})
    answer = server_after.post_json("/prompt", {"prompt": nodes})  # the dataset, an output of its own, is still shown
    errors = answer["node_errors"]
    assert [nodes[node]["class_type"] for node in errors] == ["ACLoRACheckpointOptions"]
    assert REFUSED[name] in json.dumps(errors, ensure_ascii=False)
