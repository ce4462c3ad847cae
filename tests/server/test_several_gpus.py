"""A training on several GPUs from the graph, in the real server: two processes on the CPU, by gloo."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.server.test_training_requests import ask
from tests.support.host_server import HostServer, running
from tests.support.server_runs import adapter, checkpoints, until
from tests.support.trouble import TRAIN, Browser, failure, prompt, says, with_checkpoints

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
]
PATIENCE = 300  # seconds; two processes start within some 20 on two idle cores
SEEDS = itertools.count(70)


def shared(server: HostServer, base: dict[str, Any], gpus: str = "2") -> dict[str, Any]:
    """Return the prompt with its training on several GPUs."""
    before = base[TRAIN]["inputs"]["options"]
    train = {**base[TRAIN], "inputs": {**base[TRAIN]["inputs"], "options": ["several", 0]}}
    return {**base, "several": server.node("ACLoRASpeedOptions", gpus=gpus, options=before), TRAIN: train}


def workers(server: HostServer) -> list[psutil.Process]:
    """Return the processes that train."""
    return [process for process in _below(server) if "worker.py" in " ".join(_words(process))]


def _below(server: HostServer) -> list[psutil.Process]:
    assert server.server.process is not None
    return psutil.Process(server.server.process.pid).children(recursive=True)


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _drawn(server: HostServer, base: dict[str, Any]) -> dict[str, Any]:
    """Return the prompt with previews."""
    links = {"clip": ["base", 1], "vae": ["base", 2], "options": base[TRAIN]["inputs"]["options"]}
    drawn = server.node("ACLoRAPreviewOptions", preview_every=3, preview_prompts="a rocket", **links)
    train = {**base[TRAIN], "inputs": {**base[TRAIN]["inputs"], "options": ["drawn", 0]}}
    return {**base, "drawn": drawn, TRAIN: train}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], within: float) -> None:
    """The same adapter within rounding, of which Adam makes more where a gradient is almost nothing.

    tests/core/distributed compares every number, to 1e-5.
    """
    assert found.keys() == expected.keys()
    for name, factor in expected.items():
        assert (found[name] - factor).norm() <= within * factor.norm(), name


def test_two_processes_train_the_adapter_that_one_trains_with_twice_the_batch(server: HostServer) -> None:
    server.run(_drawn(server, prompt(server, "one", batch_size=4, steps=6)), PATIENCE)
    client = uuid.uuid4().hex
    with Browser(server, client) as browser:
        graph = shared(server, _drawn(server, prompt(server, "two", batch_size=2, steps=6)))
        run = server.post_json("/prompt", {"prompt": graph, "client_id": client})["prompt_id"]
        history = server.wait(run, PATIENCE)
    assert history["status"]["status_str"] == "success", history["status"]["messages"][-1]
    expected, found = adapter(server, "one"), adapter(server, "two")
    assert_close(found, expected, within=2e-4)
    summary = says(history)
    assert "Trained on 2 processes on the CPU, 2 images each a step." in summary
    assert "Steps to choose from:" in summary and "Previews of the steps: output/aclora/" in summary
    assert [image["filename"] for image in history["outputs"][TRAIN]["images"]][-1] == "sheet.png"
    assert (TRAIN, 6) in browser.progress and browser.images  # one bar and one chart, as with one process
    assert any("2 images each a step" in text for _, text in browser.texts)
    assert workers(server) == []
    graph[TRAIN]["inputs"]["step"] = 3
    chosen = says(server.run(graph, PATIENCE))
    assert "The LoRA is that of step 3, as chosen." in chosen and "so nothing had to be trained." in chosen
    assert adapter(server, "two").keys() == expected.keys()


def _with_all_that_is_handed_over(server: HostServer, base: dict[str, Any]) -> dict[str, Any]:
    """Return the prompt with a text encoder that learns, validation images, the empty caption and restarts."""
    base["plain"]["inputs"] |= {"held_out": 0.2}
    empty = server.node("CLIPTextEncode", text="", clip=["base", 1])
    dropout = {"caption_dropout": 0.3, "unconditional": ["empty", 0], "options": ["plain", 0]}
    learning = server.node("ACLoRALearningOptions", **dropout)
    text = server.node("ACLoRATextEncoderOptions", clip=["base", 1], text_learning=1.0, options=["learning", 0])
    ranks = server.node("ACLoRARankOptions", mode="product", restart_steps=2, options=["text", 0])
    train = {**base[TRAIN], "inputs": {**base[TRAIN]["inputs"], "options": ["ranks", 0]}}
    return {**base, "empty": empty, "learning": learning, "text": text, "ranks": ranks, TRAIN: train}


def test_everything_that_the_server_hands_over_counts(server: HostServer) -> None:
    one = prompt(server, "one_all", batch_size=4, steps=6, layers="all")
    two = prompt(server, "two_all", batch_size=2, steps=6, layers="all")
    server.run(_with_all_that_is_handed_over(server, one), PATIENCE)
    server.run(shared(server, _with_all_that_is_handed_over(server, two)), PATIENCE)
    expected, found = adapter(server, "one_all"), adapter(server, "two_all")
    assert any(name.startswith("text_encoders.") for name in found)
    assert_close(found, expected, within=1e-3)  # restarts make more of a rounding than a plain training does


@contextlib.contextmanager
def endless(server: HostServer, name: str) -> Iterator[tuple[str, Browser, list[psutil.Process]]]:
    """Start a training that two processes would do for hours, with checkpoints and previews, up to a checkpoint.

    Yields its run, what a browser sees of it, and the processes.
    """
    client = uuid.uuid4().hex
    base = prompt(server, name, steps=100_000, seed=next(SEEDS))
    graph = shared(server, _drawn(server, with_checkpoints(server, base, name)))
    graph["drawn"]["inputs"]["preview_every"] = 100_000
    with Browser(server, client) as browser:
        run = server.post_json("/prompt", {"prompt": graph, "client_id": client})["prompt_id"]
        until(lambda: bool(checkpoints(server, name)), "a checkpoint", PATIENCE)
        yield run, browser, workers(server)


def test_requests_and_a_cancel_reach_the_processes_and_what_was_learned_is_kept(server: HostServer) -> None:
    with endless(server, "asked_two") as (run, browser, training):
        assert len(training) == 2
        status, drawn = ask(server, "/aclora/training/sample", TRAIN)
        assert status == 200 and "were drawn, and kept in aclora/fluent-emoji-high-contrast_0" in drawn
        status, saved = ask(server, "/aclora/training/save", TRAIN)
        assert status == 200 and saved.startswith("Saved step ") and saved.endswith(" kB.")
        server.post_json("/interrupt", {"prompt_id": run})
        history = server.wait(run, PATIENCE)
        assert any("Cancelled: finishing" in text for _, text in browser.texts)
    assert history["status"]["status_str"] == "success", history["status"]["messages"][-1]
    summary = says(history)
    assert summary.startswith("Cancelled at step") and "Run again to resume." in summary and saved in summary
    assert adapter(server, "asked_two")  # the nodes behind the training have run
    assert not any(process.is_running() for process in training)
    until(lambda: ask(server, "/aclora/training/save")[0] == 409, "the end of the requests")


def test_a_killed_process_ends_the_training_with_its_reason_and_the_last_checkpoint(server: HostServer) -> None:
    with endless(server, "killed_two") as (run, browser, training):
        (second,) = (process for process in training if process.environ()["RANK"] == "1")
        began = time.monotonic()
        second.kill()
        history = server.wait(run, PATIENCE)
        assert time.monotonic() - began < 30
        told = [text for _, text in browser.texts if text.startswith("⚠")]
    reason = failure(history)["exception_message"].strip()
    assert reason.startswith("Process 2 of 2 was killed (SIGKILL), as the system does where main memory is short")
    step = max(int(path.stem.rpartition("_")[2]) for path in checkpoints(server, "killed_two"))
    assert f"Its last checkpoint is of step {step}; run again to resume from it." in reason
    assert told == [f"⚠ {reason}"]
    until(lambda: not any(process.is_running() for process in training), "the end of the processes", 30)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGSTOP")
def test_a_process_that_hangs_is_ended_by_a_second_cancel(server: HostServer) -> None:
    with endless(server, "hung_two") as (run, browser, training):
        (second,) = (process for process in training if process.environ()["RANK"] == "1")
        second.suspend()
        server.post_json("/interrupt", {"prompt_id": run})
        until(lambda: any("Cancelled: finishing" in text for _, text in browser.texts), "the first cancel")
        server.post_json("/interrupt", {"prompt_id": run})
        history = server.wait(run, 30)
    assert [kind for kind, _ in history["status"]["messages"]][-1] == "execution_interrupted"
    until(lambda: not any(process.is_running() for process in training), "the end of the processes", 10)


def test_an_error_of_a_process_stands_on_the_node_in_its_own_sentence(server: HostServer) -> None:
    client = uuid.uuid4().hex
    with Browser(server, client) as browser:
        graph = shared(server, prompt(server, "wrong_two", max_rank=1000))
        history = server.wait(
            server.post_json("/prompt", {"prompt": graph, "client_id": client})["prompt_id"], PATIENCE
        )
        told = [text for _, text in browser.texts if text.startswith("⚠")]
    sentence = "The maximum rank is 1000, but the model's largest layer can only have rank"
    assert failure(history)["exception_message"].startswith(sentence)
    assert len(told) == 1 and told[0].startswith(f"⚠ {sentence}")
    assert workers(server) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_no_process_is_left_when_the_server_is_killed(host: Path, tmp_path: Path) -> None:
    with running(host, tmp_path, "to_kill") as server, endless(server, "orphans") as (_, _, training):
        everyone = _below(server)
        assert len(training) == 2 and len(everyone) > 2
        assert server.server.process is not None
        server.server.process.kill()
        server.server.process.wait(30)
        until(lambda: not any(process.is_running() for process in everyone), "the end of the processes", 30)
