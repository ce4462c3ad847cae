"""Queued prompts, reconnecting browsers and unloaded models during a training in the real server."""

from __future__ import annotations

import shutil
import uuid
from typing import Any
from urllib.error import HTTPError

import numpy as np
import pytest
from PIL import Image

from tests.support import trouble
from tests.support.host_server import HostServer
from tests.support.server_runs import adapter, until, was_cached
from tests.support.trouble import (
    DATASET,
    KNOWN,
    TRAIN,
    Browser,
    drawing,
    held,
    let_go,
    noise_images,
    same_bits,
    says,
)


def prompt(server: HostServer, file: str, *images: Any, steps: int = 8, **settings: Any) -> dict[str, Any]:
    """Return the prompt of a training that is long enough to be disturbed, on a GPU too."""
    return trouble.prompt(server, file, *images, steps=steps * server.pace, **settings)


@pytest.fixture(scope="module")
def alone(probed: HostServer) -> dict[str, Any]:
    """The adapter of an undisturbed training."""
    probed.run(prompt(probed, "alone", seed=1))
    return adapter(probed, "alone")


def trains(server: HostServer, browser: Browser, steps: int = 2) -> bool:
    return any(node == TRAIN and value >= steps for node, value in browser.progress)


def submit_as(server: HostServer, queued: dict[str, Any], client: str) -> str:
    return str(server.post_json("/prompt", {"prompt": queued, "client_id": client})["prompt_id"])


def test_two_queued_trainings_run_in_turn_and_give_their_usual_adapters(
    probed: HostServer, alone: dict[str, Any]
) -> None:
    let_go(probed)
    first, second = (probed.submit(prompt(probed, f"queued_{seed}", seed=seed)) for seed in (2, 1))
    queue = probed.get_json("/queue")
    assert len(queue["queue_running"]) + len(queue["queue_pending"]) == 2
    for prompt_id in (first, second):
        assert probed.wait(prompt_id)["status"]["status_str"] == "success"
    assert same_bits(adapter(probed, "queued_1"), alone)
    assert not same_bits(adapter(probed, "queued_2"), alone)


def test_sampling_queued_during_a_training_waits_and_gives_the_same_image(
    probed: HostServer, alone: dict[str, Any]
) -> None:
    (before,) = probed.images(probed.run(drawing(probed, "before")))
    let_go(probed)  # otherwise the second image would come from the cache
    client = uuid.uuid4().hex
    with Browser(probed, client) as browser:
        training = submit_as(probed, prompt(probed, "drawn_beside", seed=1, steps=9), client)
        until(lambda: trains(probed, browser), "the training")
        drawn = probed.submit(drawing(probed, "after"))
        assert probed.get_json("/queue")["queue_pending"]
        assert probed.wait(training)["status"]["status_str"] == "success"
    history = probed.wait(drawn)
    assert not was_cached(history, "draw")
    (after,) = probed.images(history)
    with Image.open(before) as one, Image.open(after) as other:
        assert np.array_equal(np.asarray(one), np.asarray(other))


def test_a_reconnected_page_gets_chart_and_text_and_another_page_the_text_once_that_is_closed(
    probed: HostServer,
) -> None:
    client = uuid.uuid4().hex
    with Browser(probed, client) as browser:
        training = submit_as(probed, prompt(probed, "watched", seed=3, steps=40), client)
        until(lambda: trains(probed, browser), "the training")
        last = max(value for node, value in browser.progress if node == TRAIN)
    assert browser.images
    with Browser(probed, uuid.uuid4().hex) as another:
        until(lambda: any(node == TRAIN for node, _ in another.texts), "a line of text in another browser")
    with Browser(probed, client) as same, Browser(probed, uuid.uuid4().hex) as another:
        until(lambda: trains(probed, same, int(last) + 2), "progress in the browser that was opened again")
        history = probed.wait(training)
        until(lambda: "execution_success" in same.kinds, "the end of the training")
    assert history["status"]["status_str"] == "success" and says(history).startswith(f"{40 * probed.pace} steps")
    assert same.images and same.images[-1].width > 100  # the chart
    # Another page may show another workflow, with other nodes of these ids.
    assert any(node == TRAIN for node, _ in same.texts) and not another.texts
    assert not another.progress and not another.images
    assert "executing" in same.kinds  # tells the page which node runs


def test_the_same_prompt_is_cached_and_a_changed_setting_trains(probed: HostServer, alone: dict[str, Any]) -> None:
    probed.run(prompt(probed, "again", seed=1))
    again = probed.run(prompt(probed, "again", seed=1))
    assert was_cached(again, TRAIN) and was_cached(again, DATASET)
    other = probed.run(prompt(probed, "again", seed=1, learning_rate=1e-3))
    assert was_cached(other, DATASET) and not was_cached(other, TRAIN)
    assert not same_bits(adapter(probed, "again"), alone)


def test_a_cancelled_training_without_checkpoints_is_trained_anew_and_a_finished_one_cached(
    probed: HostServer,
) -> None:
    client, queued = uuid.uuid4().hex, prompt(probed, "stopped", seed=4, steps=30)
    with Browser(probed, client) as browser:
        training = submit_as(probed, queued, client)
        until(lambda: trains(probed, browser), "the training")
        probed.post_json("/interrupt", {"prompt_id": training})
        history = probed.wait(training)
    assert history["status"]["status_str"] == "success" and says(history).startswith("Cancelled at step")
    learned = adapter(probed, "stopped")
    again = probed.run(queued)
    assert not was_cached(again, TRAIN) and f"{30 * probed.pace} steps" in says(again)
    assert not same_bits(adapter(probed, "stopped"), learned)
    assert was_cached(probed.run(queued), TRAIN)


def test_unloading_every_model_during_a_training_changes_nothing(probed: HostServer, alone: dict[str, Any]) -> None:
    let_go(probed)
    client = uuid.uuid4().hex
    with Browser(probed, client) as browser:
        training = submit_as(probed, prompt(probed, "unloaded", seed=1), client)
        until(lambda: trains(probed, browser), "the training")
        probed.post_json("/free", KNOWN)
        assert probed.wait(training)["status"]["status_str"] == "success"
    assert same_bits(adapter(probed, "unloaded"), alone)


def test_a_pack_that_unloads_every_model_immediately_changes_no_training(
    probed: HostServer, alone: dict[str, Any]
) -> None:
    def on_top_of_alone(file: str) -> dict[str, Any]:
        """Return the prompt of a training of a MODEL with a LoRA, which unloading would remove."""
        queued = prompt(probed, file, seed=5)
        links = {"model": ["base", 0], "lora_name": "alone.safetensors", "strength_model": 1.0}
        queued[TRAIN]["inputs"]["model"] = ["lora", 0]
        return {**queued, "lora": probed.node("LoraLoaderModelOnly", **links)}

    def weights() -> set[str]:
        """Return the weight hashes of all networks in memory, without LoRAs."""
        assert probed.post_json("/unload_at_once", {})["loaded"] == 0
        return {network["weights"] for network in held(probed)["networks"]}

    probed.run(on_top_of_alone("calm"))
    before = weights()
    let_go(probed)
    client = uuid.uuid4().hex
    with Browser(probed, client) as browser:
        training = submit_as(probed, on_top_of_alone("pestered"), client)
        for steps in range(1, 7):
            until(lambda wanted=steps * probed.pace: trains(probed, browser, wanted), "the training")
            assert probed.post_json("/unload_at_once", {})["loaded"]
        assert probed.wait(training)["status"]["status_str"] == "success"
    assert same_bits(adapter(probed, "pestered"), adapter(probed, "calm"))
    assert not any(network["hooks"] or network["own_forwards"] for network in held(probed)["networks"])
    assert weights() == before


def test_a_model_unloaded_between_dataset_and_training_is_reloaded(probed: HostServer, alone: dict[str, Any]) -> None:
    let_go(probed)
    whole = prompt(probed, "between", seed=1)
    look = {name: whole[name] for name in ("base", DATASET)}
    probed.run({**look, "look": probed.node("PreviewAny", source=[DATASET, 0])})
    probed.post_json("/free", {"unload_models": True})
    history = probed.run(whole)
    assert was_cached(history, DATASET) and was_cached(history, "base")
    assert same_bits(adapter(probed, "between"), alone)


def test_a_folder_deleted_during_a_training_fails_only_the_next_run(probed: HostServer) -> None:
    folder = noise_images(probed.base / "input" / "deleted", 9)
    client, queued = uuid.uuid4().hex, prompt(probed, "deleted", "deleted", 64)
    with Browser(probed, client) as browser:
        training = submit_as(probed, queued, client)
        until(lambda: trains(probed, browser), "the training")
        shutil.rmtree(folder)
        assert probed.wait(training)["status"]["status_str"] == "success"
    assert adapter(probed, "deleted")
    with pytest.raises(HTTPError) as refusal:
        probed.post_json("/prompt", {"prompt": queued})
    assert 'The folder \\"deleted\\" does not exist.' in refusal.value.read().decode()
