"""A full disk when a training writes a checkpoint, a LoRA or the encoding cache, in the real server."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.host_server import HostServer
from tests.support.server_runs import until, was_cached
from tests.support.trouble import (
    DATASET,
    SAVE,
    TRAIN,
    failure,
    let_go,
    no_file_longer_than,
    noise_images,
    prompt,
    says,
    with_checkpoints,
)

ROOM = 40_000  # bytes; the log is shorter, and a checkpoint or a LoRA longer


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


@pytest.mark.slow
def test_a_failed_checkpoint_is_reported_and_the_older_one_is_kept(probed: HostServer) -> None:
    folder = probed.base / "models" / "aclora_checkpoints" / "full"
    queued = with_checkpoints(probed, prompt(probed, "full", steps=30, seed=11), "full")
    del queued[SAVE]
    queued["look"] = probed.node("PreviewAny", source=[TRAIN, 2])
    training = probed.submit(queued)
    # Beside them lies the lock of the training.
    until(lambda: sum(name.startswith("first_") for name in content(folder)) >= 2, "the second checkpoint")
    with no_file_longer_than(probed, ROOM):
        history = probed.wait(training)
        left = content(folder)
    assert history["status"]["status_str"] == "success"
    told = says(history)
    assert told.startswith("30 steps") and "checkpoints could not be saved" in told and "Free some space" in told
    assert sum(name.startswith("first_") for name in left) == len(left) >= 2
    # With space again the same workflow resumes from the kept checkpoint and trains the remaining steps.
    let_go(probed)
    again = probed.run(queued)
    assert says(again).startswith("30 steps") and "could not be saved" not in says(again)
    assert max(content(folder)) == "first_0000030.safetensors"
    log = probed.log.read_text(encoding="utf-8")
    assert f"resumed at step {int(max(left).split('_')[1].split('.')[0])} of 30" in log


def test_a_lora_that_cannot_be_written_is_an_error_and_the_next_run_saves_it_without_training(
    probed: HostServer,
) -> None:
    loras = probed.base / "models" / "loras"
    probed.run(prompt(probed, "kept", seed=12))
    before = content(loras)
    queued = prompt(probed, "kept", seed=13)
    with no_file_longer_than(probed, ROOM):
        told = failure(probed.wait(probed.submit(queued)))
        assert content(loras) == before
    assert told["node_type"] == "ACLoRASave"
    assert "kept.safetensors could not be written" in told["exception_message"]
    assert "unchanged. Free some space" in told["exception_message"]
    history = probed.run(queued)
    assert was_cached(history, TRAIN) and content(loras)["kept.safetensors"] != before["kept.safetensors"]
    assert content(loras).keys() == before.keys()


def test_a_dataset_is_encoded_and_trained_on_with_a_full_disk(probed: HostServer) -> None:
    noise_images(probed.base / "input" / "packed", 3)
    queued = prompt(probed, "packed", "packed", 64, steps=2)
    del queued[SAVE]
    queued["look"] = probed.node("PreviewAny", source=[TRAIN, 2])
    with no_file_longer_than(probed, 0):
        history = probed.wait(probed.submit(queued))
    assert history["status"]["status_str"] == "success", failure(history)
    assert "cannot be stored for next time" in says(history, DATASET)
    told = says(history)  # two steps teach nothing, which is said first
    assert told.startswith("It learned nothing") and "2 steps" in told
