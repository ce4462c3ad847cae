"""Several processes train what one trains: adapter, decisions, checkpoints and failures, on the CPU by gloo."""

from __future__ import annotations

import importlib.util
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aclora_core.config import CheckpointConfig
from aclora_core.distributed import Processes
from tests.support.shared_training import CASES, QUICK, RESTARTS, launch, read, result_of, special

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
]

PACKAGES = {"Prodigy": "prodigyopt", "AdamWScheduleFree": "schedulefree", "AdamW8bit": "bitsandbytes"}
WITHOUT = {f"optimizer {name}" for name, package in PACKAGES.items() if importlib.util.find_spec(package) is None}
RUN = [case for case in CASES if case not in WITHOUT]
ENDS = [
    "to resume",
    "previews",
    "unseen prompts",
    "cancel",
    "memory",
    "no number",
    "failing refit",
    "failure",
]  # after a failure the processes are in step again


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same training within rounding."""
    assert found["factors"].keys() == expected["factors"].keys()
    for name, factor in expected["factors"].items():
        torch.testing.assert_close(
            found["factors"][name], factor, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name in ("losses", "validation", "fit", "truncations"):
        close = {"rtol": 1e-5, "atol": 1e-5, "equal_nan": True}
        torch.testing.assert_close(torch.tensor(found[name]).double(), torch.tensor(expected[name]).double(), **close)
    for name in ("ranks", "best", "epochs", "skipped", "cancelled"):
        assert found[name] == expected[name], name


def assert_same(found: dict[str, Any], other: dict[str, Any]) -> None:
    """The same training to the last bit."""
    assert all(torch.equal(factor, other["factors"][name]) for name, factor in found["factors"].items())
    assert str(found["losses"]) == str(other["losses"]) and found["validation"] == other["validation"]


def alone(case: str, size: int) -> dict[str, Any]:
    """The training of one process with as many images in a step."""
    return result_of(case, replace(CASES[case], batch_size=size * CASES[case].batch_size))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of two processes."""
    folder = tmp_path_factory.mktemp("two")
    code, output = launch(folder, [*RUN, *ENDS])
    assert code == 0, output
    return folder


@pytest.fixture(scope="module")
def four(two: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of four processes, which go on with a training of two besides."""
    folder = tmp_path_factory.mktemp("four")
    shutil.copytree(two / "checkpoints", folder / "checkpoints")
    code, output = launch(folder, ["sizes", "held-out images", "fewer images than processes", "resumed"], size=4)
    assert code == 0, output
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The training of one process that is not interrupted."""
    checkpoints = CheckpointConfig(tmp_path_factory.mktemp("whole"), every=5)
    return result_of("", replace(RESTARTS, batch_size=4), checkpoints=checkpoints)


@pytest.mark.parametrize("case", RUN)
def test_two_processes_train_what_one_trains_with_twice_the_batch(two: Path, case: str) -> None:
    first, second = read(two, case, 0), read(two, case, 1)
    assert isinstance(first, dict), first
    assert_same(first, second)
    assert_close(first, alone(case, 2))


@pytest.mark.parametrize("case", ["sizes", "held-out images", "fewer images than processes"])
def test_four_processes_train_what_one_trains_with_four_times_the_batch(four: Path, case: str) -> None:
    results = [read(four, case, rank) for rank in range(4)]
    assert isinstance(results[0], dict), results[0]
    for other in results[1:]:
        assert_same(results[0], other)
    assert_close(results[0], alone(case, 4))


def test_a_cancel_in_one_process_ends_all_at_the_same_step(two: Path) -> None:
    first, second = read(two, "cancel", 0), read(two, "cancel", 1)
    assert len(first["losses"]) == 4 and first["cancelled"] == "training"
    assert_same(first, second)


def test_previews_are_drawn_together_whenever_the_first_process_draws(two: Path) -> None:
    first, second = read(two, "previews", 0), read(two, "previews", 1)
    alone = special("previews", Processes(), two)
    assert [(done, own) for done, own, _ in first["sets"]] == [(3, 2), (6, 2)]
    assert [(done, own) for done, own, _ in second["sets"]] == [(3, 3), (6, 3)]
    for (_, _, images), (_, own, expected) in zip(first["sets"], alone["sets"], strict=False):
        assert own == 5
        torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-5)  # with the average of the weights
    assert "no preview could be drawn" in first["notes"] and "no sampler" in first["notes"]
    assert_same(first, second)


def test_unseen_prompts_are_drawn_together_and_measured_by_the_first_process(two: Path) -> None:
    first, second = read(two, "unseen prompts", 0), read(two, "unseen prompts", 1)
    alone = special("unseen prompts", Processes(), two)
    assert alone["drawn"] == 6 and (first["drawn"], second["drawn"]) == (2, 4)  # three, with and without the adapter
    assert first["unseen"][0] == 3 and second["unseen"][0] is None
    assert first["unseen"] == pytest.approx(alone["unseen"], abs=2e-4)
    assert_same(first, second)


def test_a_process_that_runs_out_of_memory_splits_its_own_share_and_nothing_else_changes(two: Path) -> None:
    first, second = read(two, "memory", 0), read(two, "memory", 1)
    assert_same(first, second)
    assert "1 at a time" in second["notes"] and not first["notes"]
    assert_close(first, result_of("memory", replace(QUICK, batch_size=4)))


def test_a_loss_that_is_no_number_in_one_process_skips_the_step_in_all(two: Path) -> None:
    first, second = read(two, "no number", 0), read(two, "no number", 1)
    assert first["skipped"] == 1
    assert_same(first, second)


def test_a_failure_reaches_the_others_with_its_reason(two: Path) -> None:
    assert read(two, "failure", 1) == "ValueError: this process cannot go on"
    assert read(two, "failure", 0) == "OtherProcessError: Process 2 of 2 has failed: this process cannot go on"


def test_a_failure_in_the_second_pass_leaves_what_was_found_before_it_in_all(two: Path) -> None:
    first, second = read(two, "failing refit", 0), read(two, "failing refit", 1)
    assert "Training on all images failed" in first["notes"] and "Training on all images failed" in second["notes"]
    assert_same(first, second)


def test_one_process_resumes_what_two_began(two: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    assert len(read(two, "to resume", 0)["losses"]) == 7
    shutil.copytree(two / "checkpoints", tmp_path / "checkpoints")
    assert_close(special("resumed", Processes(), tmp_path), whole)


def test_two_processes_resume_what_one_began(whole: dict[str, Any], tmp_path: Path) -> None:
    assert len(special("to resume", Processes(), tmp_path)["losses"]) == 7
    code, output = launch(tmp_path, ["resumed"])
    assert code == 0, output
    resumed = read(tmp_path, "resumed", 1)
    assert isinstance(resumed, dict), resumed
    assert_close(resumed, whole)


def test_four_processes_resume_what_two_began(four: Path, whole: dict[str, Any]) -> None:
    resumed = read(four, "resumed", 3)
    assert isinstance(resumed, dict), resumed
    assert_close(resumed, whole)


def test_only_the_first_process_writes_checkpoints(two: Path, four: Path) -> None:
    for folder in (two, four):
        assert (folder / "checkpoints").is_dir() and not (folder / "nothing").exists()


def test_a_process_that_is_killed_ends_the_others_with_a_sentence(tmp_path: Path) -> None:
    began = time.monotonic()
    code, output = launch(tmp_path, ["death"], patience=60)
    assert code != 0 and "SIGKILL" in output or "Signal 9" in output, output
    assert time.monotonic() - began < 60
    assert not (tmp_path / "death-1.pt").exists()
