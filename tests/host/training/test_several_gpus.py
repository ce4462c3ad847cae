"""A training on several GPUs, without its processes: how many, which nodes they run, and what is handed over."""

from __future__ import annotations

import importlib
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support import tiny_base as tiny

# Fixtures: the tiny base and two images.
parts, pictures = tiny.parts, tiny.pictures

PROMPT: dict[str, Any] = {
    "load": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "base.safetensors"}},
    "lora": {"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["load", 0], "lora_name": "ink"}},
    "data": {"class_type": "ACLoRADataset", "inputs": {"folder": "ink", "vae": ["load", 2], "clip": ["load", 1]}},
    "drawn": {"class_type": "ACLoRAPreviewOptions", "inputs": {"clip": ["load", 1], "vae": ["load", 2]}},
    "off": {
        "class_type": "ACLoRAPreviewOptions",
        "inputs": {"previews": False, "vae": ["data", 9], "clip": ["load", 1], "options": ["drawn", 0]},
    },
    "text": {"class_type": "ACLoRATextEncoderOptions", "inputs": {"clip": ["load", 1], "options": ["off", 0]}},
    "speed": {"class_type": "ACLoRASpeedOptions", "inputs": {"gpus": "2", "options": ["text", 0]}},
    "3:train": {
        "class_type": "ACLoRATrain",
        "inputs": {"model": ["lora", 0], "latents": ["data", 0], "conditioning": ["data", 1], "options": ["speed", 0]},
    },
}


@pytest.fixture
def several(pack: ModuleType) -> Any:
    return pack.nodes.training.several


@pytest.fixture
def options(pack: ModuleType) -> Any:
    """Options with previews by a VAE and a text encoder that learns."""
    found = pack.nodes.training.options.options
    previews = found.PreviewSettings(5, 0.2, ["a cat"], [[torch.ones(1, 2)], [torch.zeros(1, 2)]], 4.0, "the VAE")
    return found.Options(previews=previews, clip="the CLIP", gpus="2")


@pytest.mark.parametrize(
    ("gpus", "there", "expected"), [("1", 1, 1), ("all", 4, 4), ("3", 4, 3), ("3", 0, 3), ("all", 0, 1), ("all", 1, 1)]
)
def test_the_number_of_processes(
    several: Any, pack: ModuleType, monkeypatch: pytest.MonkeyPatch, gpus: str, there: int, expected: int
) -> None:
    monkeypatch.setattr(pack.nodes.host, "gpu_count", lambda: there)
    assert several.count.process_count(gpus) == expected


@pytest.mark.parametrize(
    ("gpus", "sentence"),
    [("3", "gpus is 3, but ComfyUI can use 2 GPUs. Set gpus on AC-LoRA Speed Options to 2 or less."), ("two", "or a")],
)
def test_more_than_there_are_is_refused_when_queued_and_when_run(
    pack: ModuleType, several: Any, monkeypatch: pytest.MonkeyPatch, gpus: str, sentence: str
) -> None:
    monkeypatch.setattr(pack.nodes.host, "gpu_count", lambda: 2)
    with pytest.raises(ValueError, match=sentence):
        several.count.process_count(gpus)
    assert sentence in pack.nodes.training.options.speed.ACLoRASpeedOptions.validate_inputs(gpus=gpus)
    assert pack.nodes.training.options.speed.ACLoRASpeedOptions.validate_inputs(gpus="2") is True


def test_a_training_that_torchrun_has_started_starts_no_others(
    pack: ModuleType, several: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = pack.aclora_core.distributed.Processes
    monkeypatch.setattr(pack.nodes.host, "processes", lambda: processes(0, 2))
    assert several.count.process_count("4") == 1


def test_how_a_step_is_shared_is_a_sentence(pack: ModuleType, several: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = pack.aclora_core.config.TrainConfig(batch_size=2)
    monkeypatch.setattr(pack.nodes.host, "gpu_count", lambda: 2)
    assert several.count.sharing_text(2, config) == "2 GPUs, 2 images each a step"
    monkeypatch.setattr(pack.nodes.host, "gpu_count", lambda: 0)
    assert (
        several.count.sharing_text(3, replace(config, accumulate=2)) == "3 processes on the CPU, 4 images each a step"
    )


def test_the_processes_run_the_nodes_that_load_the_model_alone(several: Any, options: Any) -> None:
    links = several.graph.links_of(PROMPT, "3:train", options)
    assert links == {"model": ["lora", 0], "clip": ["load", 1], "vae": ["load", 2]}
    assert several.graph.nodes_for(PROMPT, links).keys() == {"lora", "load"}
    plain = replace(options, clip=None, previews=None)
    assert several.graph.links_of(PROMPT, "3:train", plain) == {"model": ["lora", 0]}


def test_what_the_processes_cannot_repeat_is_refused(several: Any, options: Any) -> None:
    with pytest.raises(ValueError, match="comes from another training, which the processes of several GPUs cannot"):
        several.graph.nodes_for(PROMPT, {"model": ["3:train", 0]})
    with pytest.raises(ValueError, match="needs its node in the workflow itself"):
        several.graph.links_of(PROMPT, "made.by.a.loop", options)
    foreign = {**PROMPT, "speed": {"class_type": "Switch", "inputs": {"on_true": ["text", 0]}}}
    with pytest.raises(ValueError, match="options nodes connected to each other .* to find the CLIP"):
        several.graph.links_of(foreign, "3:train", options)


def a_task(pack: ModuleType, several: Any, options: Any, conditioning: list[Any]) -> Any:
    config = pack.aclora_core.config.TrainConfig(steps=7, batch_size=3)
    kept = pack.aclora_core.config.CheckpointConfig(Path("checkpoints"), 9)
    latents = [{"samples": torch.full((1, 4, 2, 2), 3.0), "aclora": {"picture": 0, "variant": 0}}]
    chosen = replace(options, checkpoints=kept)
    node = {"load": PROMPT["load"]}
    return several.task.Task(
        node, {"model": ["load", 0]}, latents, conditioning, config, chosen, 5, Path("kept"), "a", True
    )


def test_a_task_is_read_as_it_was_written(pack: ModuleType, several: Any, options: Any, tmp_path: Path) -> None:
    with torch.inference_mode():  # as in ComfyUI's nodes
        task = a_task(pack, several, options, [[[torch.ones(1, 5, 6), {"pooled_output": None}]]])
        several.task.write_task(task, tmp_path)
    read = several.task.read_task(tmp_path)
    assert (read.config, read.step, read.candidates, read.chosen.checkpoints) == (
        task.config,
        5,
        Path("kept"),
        task.chosen.checkpoints,
    )
    assert torch.equal(read.latents[0]["samples"], task.latents[0]["samples"])
    assert read.latents[0]["aclora"] == {"picture": 0, "variant": 0}
    assert torch.equal(read.conditioning[0][0][0], torch.ones(1, 5, 6))
    # Its VAE and its CLIP are loaded by each process.
    assert read.chosen.clip is None and read.chosen.previews == replace(
        task.chosen.previews, vae=None, conditionings=read.chosen.previews.conditionings
    )


def test_values_that_cannot_be_handed_over_are_refused(
    pack: ModuleType, several: Any, options: Any, tmp_path: Path
) -> None:
    task = a_task(pack, several, options, [[[torch.ones(1), {"control": lambda: None}]]])
    with pytest.raises(ValueError, match="hold what cannot be handed over to other processes"):
        several.task.write_task(task, tmp_path)


def test_processes_get_the_arguments_of_the_server_and_their_own_packs(pack: ModuleType) -> None:
    import pickle

    import comfy.cli_args

    found = pickle.loads(pack.nodes.host.arguments_with({"aclora", "other"}))
    assert found["cpu"] is True and found["base_directory"] == comfy.cli_args.args.base_directory
    assert found["disable_all_custom_nodes"] and {"aclora", "other", "other.py"} <= {*found["whitelist_custom_nodes"]}
    assert found["cuda_device"] is None and found["database_url"] == "sqlite:///:memory:"


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (-9, "was killed (SIGKILL), as the system does where main memory is short"),
        (-11, "was ended by signal 11"),
        (1, "has ended with exit code 1"),
    ],
)
def test_how_a_process_has_ended_is_said(several: Any, code: int, sentence: str) -> None:
    assert several.server._how_ended(code) == sentence


@pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
def test_of_several_that_have_failed_the_one_that_nobody_has_ended_is_named(several: Any, tmp_path: Path) -> None:
    group = several.group.Group.__new__(several.group.Group)
    group._job = tmp_path
    assert group.failures() == []
    (tmp_path / "failures.json").write_text(f"[[0, {-signal.SIGTERM}], [1, -9]]", encoding="utf-8")
    assert group.failures() == [(1, -9), (0, -signal.SIGTERM)]


def test_the_last_checkpoint_is_named(pack: ModuleType, several: Any, tmp_path: Path) -> None:
    config = pack.aclora_core.config.CheckpointConfig(tmp_path)
    assert several.server._what_is_left(config) == "It had no checkpoint yet."
    for name in ("first_0000010", "first_0000020"):
        (tmp_path / f"{name}.safetensors").touch()
    assert "Its last checkpoint is of step 20; run again" in several.server._what_is_left(config)
    assert "AC-LoRA Checkpoint Options was not connected" in several.server._what_is_left(None)


class FakeGroup:
    """Processes that tell what they are given to tell, one message at a time."""

    size = 2

    def __init__(self, messages: list[tuple[int, tuple[Any, ...]]], failures: Any = (), ended: bool = False) -> None:
        self.open, self.told, self.end, self.failures = messages, list[Any](), ended, lambda: list(failures)

    def messages(self, timeout: float) -> Any:
        return [self.open.pop(0)] if self.open else []

    def tell(self, *message: Any) -> None:
        self.told.append(message)

    @property
    def ended(self) -> bool:
        return self.end and not self.open


def follow(pack: ModuleType, several: Any, group: FakeGroup) -> list[str]:
    """Follow the processes to their end, and return what the node says meanwhile."""
    said: list[str] = []
    bar = pack.nodes.host.ProgressBar(10)
    training = SimpleNamespace(display=SimpleNamespace(bar=bar), chosen=pack.nodes.training.options.options.Options())
    several.server._Following(group, training, None, said.append, "2 GPUs").run()
    return said


def test_one_that_has_finished_may_end_long_before_the_result(
    pack: ModuleType, several: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(several.server, "_REASON_PATIENCE", -1.0)
    joined: list[Any] = [(0, ("joined",)), (1, ("joined",)), (0, ("say", "Loading …"))]
    early: list[Any] = [(1, ("finished",)), (1, ("gone",)), (0, ("say", "Counting …")), (0, ("result",))]
    assert follow(pack, several, FakeGroup(joined + early)) == ["Loading …\n2 GPUs", "Counting …\n2 GPUs"]


@pytest.mark.parametrize(
    ("messages", "failures", "sentence"),
    [
        ([(1, ("gone",))], [(1, -9)], "^Process 2 of 2 was killed .SIGKILL"),
        ([(1, ("gone",))], [], "^The processes of this training have ended without a reason. Nothing of it is kept"),
        ([(0, ("failed", "Process 2 of 2 has failed: no", "OtherProcessError"))], [], "^Process 2 of 2 has failed: no"),
        ([(0, ("failed", "The rank is too large.", "ValueError"))], [], "^The rank is too large.$"),
    ],
)
def test_how_a_training_fails_is_said(
    pack: ModuleType,
    several: Any,
    monkeypatch: pytest.MonkeyPatch,
    messages: list[Any],
    failures: list[Any],
    sentence: str,
) -> None:
    monkeypatch.setattr(several.server, "_REASON_PATIENCE", -1.0)
    with pytest.raises(several.server.WorkersError, match=sentence):
        follow(pack, several, FakeGroup(messages, failures))


def test_the_own_reason_of_the_one_that_failed_comes_before_that_of_the_others(pack: ModuleType, several: Any) -> None:
    lost = (0, ("failed", "Another process of this training has ended.", "OtherProcessError"))
    own = (1, ("failed", "CUDA out of memory.", "OutOfMemoryError"))
    with pytest.raises(several.server.WorkersError, match="^CUDA out of memory.$"):
        follow(pack, several, FakeGroup([lost, own]))


def test_processes_that_do_not_find_each_other_are_given_up(
    pack: ModuleType, several: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(several.server, "_START_PATIENCE", -1.0)
    with pytest.raises(several.server.WorkersError, match="The 2 processes did not find each other within"):
        follow(pack, several, FakeGroup([(0, ("joined",))]))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the file /dev/full of Linux")
def test_a_full_disk_is_reported_as_one(pack: ModuleType, several: Any, options: Any, tmp_path: Path) -> None:
    (tmp_path / "task.pt").symlink_to("/dev/full")
    task = a_task(pack, several, options, [[[torch.ones(1, 5, 6), {}]]])
    with pytest.raises(OSError, match="No space left on device"):
        several.task.write_task(task, tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the file /dev/full of Linux")
def test_a_result_that_cannot_be_handed_over_is_saved(
    pack: ModuleType, several: Any, options: Any, parts: Any, pictures: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    import folder_paths

    part = importlib.import_module(f"{several.__name__}.part")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path / "loras")], {".safetensors"}))
    (tmp_path / "result.pt").symlink_to("/dev/full")
    latents, conditioning = pictures
    config = pack.aclora_core.config.TrainConfig(steps=2, batch_size=2, max_rank=4)
    chosen = type(options)()
    task = several.task.Task({}, {}, latents, conditioning, config, chosen, 0, tmp_path / "kept", "a", True)
    line = SimpleNamespace(attach=lambda handle: None, send=lambda *message: None)
    with (
        torch.inference_mode(),
        pytest.raises(OSError, match="cannot be handed over: .*No space left.* Saved the LoRA"),
    ):
        part._train(task, parts[0], None, None, tmp_path, line, line.send)
    (file,) = (tmp_path / "loras" / "aclora").iterdir()
    assert file.suffix == ".safetensors" and "step" not in file.name
