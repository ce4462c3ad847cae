"""Checkpoints: a training that was ended by force goes on to the same bits, and never goes on with something else."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from aclora_core.config.checkpoints import CheckpointConfig, Resume
from aclora_core.config.train_config import TrainConfig
from aclora_core.storage import read_safetensors
from aclora_core.training import checkpoint
from aclora_core.training.checkpoint import CheckpointStore
from aclora_core.training.fingerprint import Fingerprint, differences, training_fingerprint
from aclora_core.training.progress import Progress, Result
from tests.support.toy import CLEAN, FLOW, HELD_OUT, Toy, planted, toy, train

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[3]
QUICK = TrainConfig(steps=12, learning_rate=0.01, batch_size=4, max_rank=4, mode="off", held_out=0.0)
HELD = replace(HELD_OUT, steps=24, learning_rate=0.05, batch_size=8, max_rank=4, restart_every=2, stop_early=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints" / "ink"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_same(result: Result, other: Result) -> None:
    assert result.report.losses == other.report.losses and result.report.validation == other.report.validation
    assert result.report.restarts == other.report.restarts and result.report.truncations == other.report.truncations
    for name, layer in result.adapter.layers.items():
        assert torch.equal(layer.lora_down, other.adapter.layers[name].lora_down)
        assert torch.equal(layer.lora_up, other.adapter.layers[name].lora_up)


def stopped_at(step: int, config: TrainConfig, checkpoints: CheckpointConfig, model: Toy | None = None) -> Result:
    seen: list[int] = []
    model = model or toy(16)
    return train(model, config, lambda p: seen.append(p.done), lambda: seen[-1:] == [step], checkpoints=checkpoints)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork, which makes many processes cheap")
def test_a_training_killed_at_any_point_and_resumed_gives_the_same_bits(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "tests" / "support" / "killed_training.py"), str(tmp_path)]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    said = subprocess.run(script, env=settings, capture_output=True, text=True, timeout=300)
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout)
    assert found["rank"] == 2 and found["restarts"] == 2 and len(found["ends"]) == 20
    for point, was_killed, end in found["ends"]:
        assert was_killed and end == found["whole"], point
    assert len(found["left"]) == 3 and not any("partial" in name for name in found["left"])


@pytest.mark.parametrize("config", [QUICK, HELD], ids=["no picture held out", "held out"])
@pytest.mark.parametrize("step", [1, 5, 12])
def test_a_cancelled_training_goes_on_where_it_was(folder: Path, config: TrainConfig, step: int) -> None:
    checkpoints, seen = CheckpointConfig(folder, every=1000), list[tuple[int, int]]()
    cancelled = stopped_at(step, config, checkpoints)
    assert len(cancelled.report.losses) == step and names(folder) == [f"first_{step:07}.safetensors"]
    resumed = train(toy(16), config, lambda p: seen.append((p.done, p.resumed_at)), checkpoints=checkpoints)
    assert_same(resumed, train(toy(16), config))
    assert [at for _, at in seen] == [step] * len(seen) and [done for done, _ in seen][:1] in ([step + 1], [])
    assert resumed.report.facts.steps_run == train(toy(16), config).report.facts.steps_run


def test_a_cancel_in_the_second_pass_gives_what_the_first_found_and_keeps_the_second(folder: Path) -> None:
    whole, first = train(toy(16), HELD), train(toy(16), replace(HELD, refit=False))
    step = whole.report.facts.steps_run - 3
    cancelled = stopped_at(step, HELD, CheckpointConfig(folder))
    assert_same(cancelled, first)
    assert cancelled.report.facts.steps_run == step
    model = toy(16)
    assert_same(train(model, HELD, checkpoints=CheckpointConfig(folder)), whole)
    assert len(model.learned) == 1 + 3  # the trial, and the steps that were left


def test_a_finished_training_is_not_trained_again(folder: Path) -> None:
    whole, model = train(toy(16), HELD, checkpoints=CheckpointConfig(folder)), toy(16)
    assert_same(train(model, HELD, checkpoints=CheckpointConfig(folder)), whole)
    assert len(model.learned) == 1


def test_the_last_ones_are_kept_and_the_end_of_the_first_pass(folder: Path) -> None:
    report = train(toy(16), HELD, checkpoints=CheckpointConfig(folder, every=5, keep=3)).report
    best = len(report.losses)
    assert names(folder)[0] == "first_0000024.safetensors" and names(folder)[-1] == f"refit_{best:07}.safetensors"
    assert len(names(folder)) == min(3, len({*range(5, best + 1, 5), best})) + 1
    train(toy(16), replace(QUICK, seed=3), checkpoints=CheckpointConfig(folder, every=4, keep=2, resume="never"))
    assert names(folder) == ["first_0000008.safetensors", "first_0000012.safetensors"]


def test_never_starts_anew(folder: Path) -> None:
    seen: list[int] = []
    stopped_at(5, QUICK, CheckpointConfig(folder))
    train(toy(16), QUICK, lambda p: seen.append(p.done), checkpoints=CheckpointConfig(folder, resume="never"))
    assert seen == list(range(1, 13))


def test_an_older_checkpoint_is_taken_where_the_last_is_damaged(folder: Path, caplog) -> None:
    train(toy(16), QUICK, checkpoints=CheckpointConfig(folder, every=5, keep=3))
    assert names(folder) == [f"first_{step:07}.safetensors" for step in (5, 10, 12)]
    (folder / "first_0000012.safetensors").write_bytes(b"")
    blob = (folder / "first_0000010.safetensors").read_bytes()
    (folder / "first_0000010.safetensors").write_bytes(blob[:-20])
    seen: list[int] = []
    result = train(toy(16), QUICK, lambda p: seen.append(p.done), checkpoints=CheckpointConfig(folder))
    assert seen == list(range(6, 13)) and "first_0000012.safetensors is damaged" in caplog.text
    assert_same(result, train(toy(16), QUICK))


def test_checkpoints_of_which_none_can_be_read_are_neither_passed_over_nor_deleted(folder: Path, monkeypatch) -> None:
    train(toy(16), QUICK, checkpoints=CheckpointConfig(folder, every=5))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_FORMAT", "of another version")
        patch.setattr(checkpoint, "_UNHASHED", "of an older version")
        with pytest.raises(ValueError, match=f"None of the {len(before)} checkpoints of '{folder.name}' can be read"):
            train(toy(16), QUICK, checkpoints=CheckpointConfig(folder))

        def gone(path: Path) -> None:
            raise OSError(errno.EIO, "Input/output error")

        patch.setattr(checkpoint, "read_safetensors", gone)
        with pytest.raises(
            OSError, match="first_0000012.safetensors cannot be read .*Check that its drive is connected"
        ):
            train(toy(16), QUICK, checkpoints=CheckpointConfig(folder))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def as_0_3_0(path: Path, change: Callable[[dict[str, Any]], None] = lambda content: None) -> None:
    """Rewrite a checkpoint without a hash and without how noise levels were drawn, as 0.3.0 did."""
    tensors, metadata = read_safetensors(path)
    content = json.loads(metadata["content"])
    for name in ("timesteps", "prediction"):
        content["fingerprint"]["model"].pop(name, None)
    change(content)
    metadata = {"format": "aclora checkpoint 2", "content": json.dumps(content)}
    path.write_bytes(safetensors.torch.save(tensors, metadata))


@pytest.fixture
def two(folder: Path) -> list[Path]:
    """The paths of two checkpoints, of the steps 5 and 10, of a training of 12."""
    stopped_at(10, QUICK, CheckpointConfig(folder, every=5))
    return sorted(folder.iterdir())


def assert_goes_on_after(step: int, folder: Path) -> Result:
    seen: list[int] = []
    result = train(toy(16), QUICK, lambda p: seen.append(p.done), checkpoints=CheckpointConfig(folder))
    assert seen[0] == step + 1
    assert_same(result, train(toy(16), QUICK))
    return result


def flip(path: Path, tensor: str) -> None:
    """Change one bit in the numbers of a tensor."""
    blob = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(blob[:8], "little")
    begin, _ = json.loads(blob[8:start])[tensor]["data_offsets"]
    blob[start + begin] ^= 1
    path.write_bytes(blob)


@pytest.mark.parametrize("tensor", ["/work/weights", "/work/generator", "/work/stepper/last_good"])
def test_one_changed_bit_in_the_numbers_is_found_and_told(folder: Path, two: list[Path], tensor: str, caplog) -> None:
    flip(two[1], tensor)
    notes = assert_goes_on_after(5, folder).report.facts.notes
    assert notes == f"The checkpoint {two[1].name} was damaged, so training went on from the one before it."
    assert f"{two[1].name} is damaged (its content does not match its hash" in caplog.text


def test_a_folder_and_a_dead_link_under_its_name_are_passed_over(folder: Path, two: list[Path], caplog) -> None:
    two[1].unlink()
    two[1].mkdir()
    (folder / "first_0000011.safetensors").symlink_to(folder / "nowhere")
    result = assert_goes_on_after(5, folder)
    assert "first_0000011.safetensors was damaged" in result.report.facts.notes and two[1].is_dir()


DAMAGED_CONTENT: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no fingerprint": lambda content: content.pop("fingerprint"),
    "no steps": lambda content: content["fingerprint"]["settings"].pop("steps"),
    "images of another shape": lambda content: content["fingerprint"].update(pictures=[[1.0]]),
    "a list as the model": lambda content: content["fingerprint"].update(model=[]),
    "no state": lambda content: content.update(state=[]),
    "no weights": lambda content: content["state"]["work"].pop("weights"),
    "weights of another shape": lambda content: content["state"]["work"].update(weights=[1.0]),
    "a tensor that is not there": lambda content: content["state"]["work"].update(weights={"tensor of the file": "?"}),
    "no generator": lambda content: content["state"]["work"].update(generator=None),
    "no facts": lambda content: content["state"].update(facts={"images": "many"}),
    "no trajectory": lambda content: content["state"]["progress"].update(trajectory="{}"),
    "history of another shape": lambda content: content["state"].update(fit={"history": [[1]]}),
}


@pytest.mark.parametrize("what", DAMAGED_CONTENT)
def test_damage_that_no_hash_finds_leads_to_the_one_before_it(folder: Path, two: list[Path], what: str) -> None:
    for path in two:
        as_0_3_0(path)
    as_0_3_0(two[1], DAMAGED_CONTENT[what])
    assert f"{two[1].name} was damaged" in assert_goes_on_after(5, folder).report.facts.notes


def test_a_hash_that_was_taken_away_is_missed(folder: Path, two: list[Path]) -> None:
    tensors, metadata = read_safetensors(two[1])
    del metadata["hash"]
    two[1].write_bytes(safetensors.torch.save(tensors, metadata))
    assert_goes_on_after(5, folder)


def test_a_damaged_checkpoint_of_the_second_pass_leads_to_the_one_before_it(folder: Path) -> None:
    whole = train(toy(16), HELD, checkpoints=CheckpointConfig(folder, every=5))
    last = folder / names(folder)[-1]
    as_0_3_0(last, lambda content: content["state"]["work"].pop("weights"))
    resumed = train(toy(16), HELD, checkpoints=CheckpointConfig(folder, every=5))
    assert_same(resumed, whole)
    assert f"{last.name} was damaged" in resumed.report.facts.notes


def test_a_folder_that_another_server_trains_in_is_refused(folder: Path) -> None:
    def second(progress: Progress) -> None:
        before = names(folder)
        with pytest.raises(
            ValueError,
            match="Another training, on another ComfyUI server, is writing its checkpoints to 'ink' right now",
        ):
            train(toy(16), QUICK, checkpoints=CheckpointConfig(folder, resume="never"))
        assert names(folder) == before

    train(toy(16), QUICK, second, checkpoints=CheckpointConfig(folder, every=5))
    assert not any(name.startswith(".") for name in names(folder))


FLOW_NOW = replace(FLOW, sampling="uniform", odds=2.0)  # with more noise than 0.3.0 gave such a model


def test_an_old_checkpoint_of_a_flow_model_goes_on_with_its_noise_levels(folder: Path) -> None:
    whole = train(toy(16, objective=FLOW), QUICK)
    stopped_at(5, QUICK, CheckpointConfig(folder), toy(16, objective=FLOW))
    as_0_3_0(folder / "first_0000005.safetensors")
    stopped_at(8, QUICK, CheckpointConfig(folder), toy(16, objective=FLOW_NOW))
    resumed = train(toy(16, objective=FLOW_NOW), QUICK, checkpoints=CheckpointConfig(folder))
    assert_same(resumed, whole)
    assert whole.report.losses != train(toy(16, objective=FLOW_NOW), QUICK).report.losses
    assert resumed.report.settings["timesteps"] == "logit-normal" and resumed.report.settings["timestep_shift"] == 1


def test_a_checkpoint_says_how_noise_levels_are_drawn(folder: Path) -> None:
    stopped_at(5, replace(QUICK, timestep_shift=1.5), CheckpointConfig(folder), toy(16, objective=FLOW_NOW))
    _, metadata = read_safetensors(folder / "first_0000005.safetensors")
    assert json.loads(metadata["content"])["fingerprint"]["model"]["timesteps"] == "uniform 3.0"
    config = replace(QUICK, timestep_shift=1.5)
    later = toy(16, objective=replace(FLOW_NOW, odds=4.0))  # as a later version may choose
    resumed = train(later, config, checkpoints=CheckpointConfig(folder))
    assert_same(resumed, train(toy(16, objective=FLOW_NOW), config))


def test_only_its_own_files_are_deleted(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in ("ink.safetensors", ".ink.safetensors.7.partial", ".first_0000001.safetensors.7.partial"):
        (folder / name).write_bytes(b"")
        os.utime(folder / name, (0, 0))
    train(toy(16), QUICK, checkpoints=CheckpointConfig(folder))
    assert names(folder) == [".ink.safetensors.7.partial", "first_0000012.safetensors", "ink.safetensors"]


def changed(place: int) -> Toy:
    """The toy with one picture a little retouched."""
    model = toy(16)
    picture = model.latents[place].clone()
    picture[0, :2] += 0.5
    model.latents = [*model.latents[:place], picture, *model.latents[place + 1 :]]
    return model


OTHERS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a setting": (lambda: toy(16), {"learning_rate": 0.02}, r"learning_rate was 0\.01 and is 0\.02"),
    "a word": (lambda: toy(16), {"mode": "paper"}, r"mode was 'off' and is 'paper'"),
    "two settings": (lambda: toy(16), {"seed": 1, "max_rank": 2}, r"max_rank was 4 and is 2; seed was 0 and is 1"),
    "more steps": (lambda: toy(16), {"steps": 20}, r"steps was 12 and is 20.*'for more steps'"),
    "a picture": (lambda: changed(2), {}, r"image 3 of 16 or its caption has changed"),
    "other pictures": (lambda: toy(16, latents=[-x for x in toy(16).latents]), {}, r"1, 2, 3, 4, 5 and 11 more of 16"),
    "fewer pictures": (lambda: toy(15), {}, "there were 16 images and now there are 15"),
    "another model": (lambda: toy(16, error=planted(3)), {}, "the model's weights have changed"),
    "other noise": (
        lambda: toy(16, objective=replace(CLEAN, sigma_at=lambda share: 2 * share)),
        {},
        r"the model's noise was 0\.1 0\.5 0\.9 and is 0\.2 1 1\.8",
    ),
    "another prediction": (
        lambda: toy(16, objective=replace(FLOW, prediction="v")),
        {},
        "the model's prediction was a target of its own and is v",
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_checkpoint_of_another_training_is_refused_with_the_difference(folder: Path, what: str) -> None:
    make, settings, sentence = OTHERS[what]
    stopped_at(5, QUICK, CheckpointConfig(folder))
    model, seen = make(), list[Progress]()
    with pytest.raises(ValueError, match=sentence) as refusal:
        train(model, replace(QUICK, **settings), seen.append, checkpoints=CheckpointConfig(folder))
    assert "'ink'" in str(refusal.value) and "'never'" in str(refusal.value)
    assert not seen and not model.calls and names(folder) == ["first_0000005.safetensors"]


def test_pictures_that_differ_by_rounding_and_settings_of_speed_go_on(folder: Path) -> None:
    stopped_at(5, QUICK, CheckpointConfig(folder))
    generator = torch.Generator().manual_seed(0)
    near = [x * (1 + 3e-3 * torch.randn(x.shape, generator=generator)) for x in toy(16).latents]
    seen: list[int] = []
    config = replace(QUICK, graph=False, checkpointing="all")
    train(toy(16, latents=near), config, lambda p: seen.append(p.done), checkpoints=CheckpointConfig(folder))
    assert seen == list(range(6, 13))


def test_a_changed_caption_is_another_picture() -> None:
    class Captioned(Toy):
        def conditioning(self, pictures: Any) -> dict[str, torch.Tensor]:
            return {"text": self.words[list(pictures)]}

    model = Captioned(planted(), toy(16).latents)
    model.words = torch.randn(16, 20, 32, generator=torch.Generator().manual_seed(0)) * 10
    before = training_fingerprint(model, model, QUICK, range(16))
    model.words = model.words.clone()
    model.words[7, 3] += 5 * torch.randn(32, generator=torch.Generator().manual_seed(1))
    assert differences(before, training_fingerprint(model, model, QUICK, range(16))) == [
        "image 8 of 16 or its caption has changed"
    ]
    again = Fingerprint(**json.loads(json.dumps(before.state_dict())))
    assert again == before and differences(again, before) == []


def test_repeats_are_summed_once_to_the_same_fingerprint() -> None:
    """Three images with two variants each, all of them twice; the last one of all is an image of its own."""
    latents = [*toy(3).latents, *[-x for x in toy(3).latents]] * 2
    latents[11] = latents[11].bfloat16().float()
    variants = {index: [index, index + 3] for index in (0, 1, 2, 6, 7, 8)}
    model = toy(12, latents=latents, variants=variants, masks={3: torch.ones(1, 1, 1, 1), 9: torch.ones(1, 1, 1, 1)})
    model.without_caption = dict.fromkeys(range(12), 0)
    config = replace(QUICK, caption_dropout=0.1)
    found = training_fingerprint(model, model, config, list(variants)).pictures
    alone = [training_fingerprint(model, model, config, [index]).pictures for index in variants]
    assert found == [image for images in alone for image in images] and len(found) == 12
    assert [found[place + 6][0] is found[place][0] for place in range(6)] == [True] * 5 + [False]
    assert found[7][2] is found[1][2]  # masks
    assert len({id(image[-1]) for image in found}) == 1  # the empty caption, of which each is a new tensor


def test_a_setting_from_a_later_version_counts_as_its_default() -> None:
    now = training_fingerprint(toy(4), toy(4), QUICK, range(4))
    early = Fingerprint({k: v for k, v in now.settings.items() if k != "alpha"}, now.pictures, now.model)
    assert differences(early, now) == []
    other = training_fingerprint(toy(4), toy(4), replace(QUICK, alpha=3.0), range(4))
    assert differences(early, other) == ["alpha was 8.0 and is 3.0"]


def test_more_steps_are_those_of_a_longer_training(folder: Path) -> None:
    more = CheckpointConfig(folder, resume="for more steps")
    train(toy(16), QUICK, checkpoints=CheckpointConfig(folder))
    seen: list[int] = []
    longer = train(toy(16), replace(QUICK, steps=30), lambda p: seen.append(p.done), checkpoints=more)
    assert seen == list(range(13, 31))
    assert_same(longer, train(toy(16), replace(QUICK, steps=30)))
    model = toy(16)  # once more: it has its steps
    assert_same(train(model, replace(QUICK, steps=30), checkpoints=more), longer)
    assert len(model.learned) == 1


def test_more_steps_go_on_with_the_first_pass_and_refit_anew(folder: Path) -> None:
    train(toy(16), HELD, checkpoints=CheckpointConfig(folder))
    assert names(folder)[-1].startswith("refit")
    stages: list[str] = []
    more = CheckpointConfig(folder, resume="for more steps")
    longer = train(toy(16), replace(HELD, steps=40), lambda p: stages.append(p.stage), checkpoints=more)
    best = longer.report.facts.best_step
    assert best > 24 and stages.count("training") == 40 - 24 and stages.count("training on all") == best
    assert [step for step, _ in longer.report.validation][-1] == 40


@pytest.mark.parametrize(
    ("resume", "steps", "sentence"),
    [("for more steps", 8, "planned for 12 steps; set steps to more, not to 8"), ("sometimes", 12, "'sometimes'")],
)
def test_a_wish_that_makes_no_sense_is_refused(folder: Path, resume: Resume, steps: int, sentence: str) -> None:
    stopped_at(5, QUICK, CheckpointConfig(folder))
    with pytest.raises(ValueError, match=sentence):
        train(toy(16), replace(QUICK, steps=steps), checkpoints=CheckpointConfig(folder, resume=resume))


def test_more_steps_of_a_training_that_stopped_by_itself_need_a_word(folder: Path) -> None:
    """Else it would only stop again."""
    config = replace(
        HELD, steps=400, learning_rate=0.05, max_rank=8, mode="off", weight_decay=0.0, stop_early=True, refit=False
    )
    report = train(toy(16, objective=FLOW), config, checkpoints=CheckpointConfig(folder)).report
    steps = len(report.losses)
    assert steps < 400
    more = CheckpointConfig(folder, resume="for more steps")
    with pytest.raises(
        ValueError, match=rf"stopped by itself at step {steps}: step \d+ was better\. .*switch stop_early off"
    ):
        train(toy(16, objective=FLOW), replace(config, steps=500), checkpoints=more)
    on = train(toy(16, objective=FLOW), replace(config, steps=500, stop_early=False), checkpoints=more).report
    assert len(on.losses) == 500 and on.losses[:steps] == report.losses


@pytest.mark.parametrize(("every", "keep"), [(0, 2), (5, 0)])
def test_checkpoints_without_a_number_are_refused(tmp_path: Path, every: int, keep: int) -> None:
    with pytest.raises(ValueError, match="must be 1 or more, but is 0"):
        CheckpointConfig(tmp_path, every, keep)


def test_a_full_disk_is_told_and_training_goes_on(folder: Path, monkeypatch, caplog) -> None:
    written: list[int] = []

    def fsync(file: int) -> None:
        written.append(file)
        if len(written) in (2, 3):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    notes: list[list[str]] = []
    with caplog.at_level(logging.WARNING, logger="aclora"):
        result = train(
            toy(16), QUICK, lambda p: notes.append(list(p.notes)), checkpoints=CheckpointConfig(folder, every=3, keep=3)
        )
    assert_same(result, train(toy(16), QUICK))
    assert names(folder) == ["first_0000003.safetensors", "first_0000012.safetensors"]  # 6 and 9 found no room
    told = "Some checkpoints could not be saved: No space left on device. Free some space; "
    told += "training goes on and tries again."
    assert not notes[5] and notes[6] == notes[-1] == [told] and result.report.facts.notes == told
    assert all(f"step {step}: no checkpoint, as first_{step:07}.safetensors could" in caplog.text for step in (6, 9))


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    now = Fingerprint({"steps": 3}, [], {})
    state = {
        "tensors": {"half": torch.ones(3).half(), "view": torch.arange(6.0).view(2, 3).T, "flags": torch.ones(4) > 0},
        "generator": torch.Generator().manual_seed(3).get_state(),
        "scalar": torch.tensor(2.5),
        "numbers": [1, 0.1 + 0.2, math.inf, "text", None, True],
        "empty": {},
    }
    store = CheckpointStore(CheckpointConfig(tmp_path), now)
    assert store.write("first", 3, state) == "" and store.has("first", 3) and not store.has("refit", 3)
    again = CheckpointStore(CheckpointConfig(tmp_path), now).find()
    assert again is not None and again["numbers"] == state["numbers"] and again["empty"] == {}
    for name in ("half", "view", "flags"):
        assert again["tensors"][name].dtype == state["tensors"][name].dtype  # type: ignore[index]
        assert torch.equal(again["tensors"][name], state["tensors"][name])  # type: ignore[index]
    assert torch.equal(again["generator"], state["generator"]) and again["scalar"] == 2.5
