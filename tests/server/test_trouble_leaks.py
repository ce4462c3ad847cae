"""Finished, failed and cancelled trainings leak nothing, in the real server and in this process."""

from __future__ import annotations

import gc
import importlib
import uuid
import weakref
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.support.host_server import HostServer
from tests.support.server_runs import until
from tests.support.train_node import train
from tests.support.trouble import TRAIN, Browser, drawing, failure, held, let_go, prompt

# Bytes that the server's memory may differ by: below one copy of the tiny base (90 MB), far above what it swings by.
GROWTH = 20e6


def cancelled(server: HostServer, seed: int) -> None:
    client = uuid.uuid4().hex
    with Browser(server, client) as browser:
        queued = prompt(server, "leaks", seed=seed, steps=400)
        running = str(server.post_json("/prompt", {"prompt": queued, "client_id": client})["prompt_id"])
        until(lambda: any(node == TRAIN and value >= 2 for node, value in browser.progress), "the training")
        server.post_json("/interrupt", {"prompt_id": running})
        assert server.wait(running)["status"]["status_str"] == "success"


def failed(server: HostServer, seed: int) -> None:
    queued = prompt(server, "leaks", seed=seed, max_rank=1024)
    assert "maximum rank" in failure(server.wait(server.submit(queued)))["exception_message"]


def rounds(server: HostServer, first: int) -> dict[str, Any]:
    """Run a finished, a cancelled and a failed training; return the server's memory after each."""
    server.run(prompt(server, "leaks", seed=first))
    cancelled(server, first + 1)
    failed(server, first + 2)
    return held(server)


@pytest.mark.slow
def test_finished_cancelled_and_failed_trainings_leak_nothing(probed: HostServer) -> None:
    let_go(probed)
    probed.run(drawing(probed, "leaks"))
    (untouched,) = held(probed)["networks"]
    first = rounds(probed, 20)
    for number in range(2):
        last = rounds(probed, 30 + 10 * number)
    assert last["networks"] == [untouched] and untouched["hooks"] == untouched["own_forwards"] == 0
    for kind in ("tensors", "threads", "python_threads", "files", "temporary"):
        assert last[kind] == first[kind], kind
    assert len(list((probed.base / "temp" / "aclora_candidates").glob("*/*"))) == 3  # the last trainings
    assert not list((probed.base / "models" / "loras").glob(".*"))
    empty = let_go(probed)
    probed.run(prompt(probed, "leaks", seed=99))
    again = let_go(probed)
    assert again["tensors"] == empty["tensors"] and not again["networks"]
    assert again["memory"] - empty["memory"] < GROWTH and last["memory"] - first["memory"] < GROWTH


@pytest.mark.parametrize("images", [2, 9])
def test_the_memory_of_a_training_is_freed_when_it_ends(
    pack: ModuleType, monkeypatch: pytest.MonkeyPatch, images: int
) -> None:
    """It is freed before Python's next garbage collection, as the next node may need it."""
    opening = importlib.import_module(f"{pack.__name__}.nodes.host.session")
    passes = importlib.import_module(f"{pack.__name__}.aclora_core.training.trainer")
    alive: list[weakref.ref[Any]] = []

    def watched(made: Any) -> Any:
        def make(*given: Any, **named: Any) -> Any:
            thing = made(*given, **named)
            alive.extend(map(weakref.ref, (thing, *filter(lambda part: hasattr(part, "load_device"), given))))
            return thing

        return make

    monkeypatch.setattr(opening, "HostModel", watched(opening.HostModel))
    monkeypatch.setattr(passes, "Stepper", watched(passes.Stepper))
    with torch.inference_mode():
        model, clip, *_ = pack.nodes.tiny_base.ACLoRATinyBase.execute().result
        caption = clip.encode_from_tokens_scheduled(clip.tokenize("a cat"))
        latents = [{"samples": torch.full((1, 16, 16, 16), float(number))} for number in range(images)]
    gc.disable()
    try:
        settings = {"steps": 2, "batch_size": 2, "max_rank": 4, "layers": "attention"}
        train(pack, model, latents, [caption] * images, settings)
        assert len(alive) >= 3 and not [thing() for thing in alive if thing() is not None]
    finally:
        gc.enable()
