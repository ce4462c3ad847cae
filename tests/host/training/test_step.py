"""The input `step`: another step of the same training, at once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.host.training.test_previews import preview_settings
from tests.support import tiny_base as tiny
from tests.support.tiny_base import QUICK, progress, trained, untouched
from tests.support.train_node import run_node

# Fixtures: the tiny base, two images, and ComfyUI's Cancel.
parts, model, pictures, interrupt = tiny.parts, tiny.model, tiny.pictures, tiny.interrupt
SETTINGS = {"steps": 4, "learning_rate": 1e-2, "smallest": False}


@pytest.fixture(autouse=True)
def temp(pack, tmp_path, monkeypatch):
    """An empty temp folder and output folder, so that nothing of another test is found; images are drawn quickly."""
    import folder_paths

    monkeypatch.setattr(pack.nodes.host.preview_sampling, "STEPS", 1)
    monkeypatch.setattr(pack.aclora_core.training.learned_style, "STEPS", 1)
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    return tmp_path / "temp"


@pytest.fixture
def trainings(pack, monkeypatch):
    """The seeds of the trainings that have run, in order."""
    seeds = []
    real = pack.nodes.training.training.train

    def train(network, images, config, *others, **named):
        seeds.append(config.seed)
        return real(network, images, config, *others, **named)

    monkeypatch.setattr(pack.nodes.training.training, "train", train)
    return seeds


def said(pack, model, pictures, previews=None, before=(), **settings):
    """Run the node, and return its outputs and what it shows."""
    output = run_node(pack, model, *pictures, {**QUICK, **SETTINGS, **settings}, before, previews=previews)
    return output.result, output.ui


def kept_files(temp: Path, name: str) -> list[Path]:
    return sorted((temp / "aclora_candidates").glob(f"*/*/{name}"))


def assert_same(adapter, other):
    assert adapter.keys() == other.keys()
    for key, tensor in adapter.items():
        assert torch.equal(tensor, other[key]), key


def test_another_step_comes_at_once_and_as_it_was_kept(pack, model, pictures, trainings, temp):
    from safetensors.torch import load_file

    with untouched(model):
        automatic, shown = said(pack, model, pictures, smallest=False)  # steps are kept whole
        chosen, told = said(pack, model, pictures, smallest=False, step=2)
    assert trainings == [0] and [image["filename"] for image in shown["images"]] == ["training_00001_.png"]  # no sheet
    assert "Steps to choose from: 1, 2, 3, 4 (automatic). To use another, enter it as step" in shown["text"][0]
    assert told["text"][0].startswith("The LoRA is that of step 2, as chosen.")
    assert "This step was kept, so nothing had to be trained. Steps to choose from: 1, 2, 3, 4 (auto" in told["text"][0]
    (file,) = kept_files(temp, "step_0000002.safetensors")
    kept = {key: tensor.float() for key, tensor in load_file(file).items()}
    assert_same(chosen[1], kept)
    for key, tensor in trained(pack, model, *pictures, **{**SETTINGS, "steps": 2, "smallest": False})[1].items():
        torch.testing.assert_close(chosen[1][key], tensor, rtol=1e-3, atol=1e-6)
    report = chosen[3]
    assert report.facts.chosen_step == 2 and report.facts.base_model == "SD3" and report.facts.resolution == "128x128"
    assert report.losses == automatic[3].losses[:2] and chosen[2]["loss"] == report.losses
    assert set(report.signal) == set(automatic[3].signal) and len(chosen[0].patches) == len(automatic[0].patches)


def test_back_to_the_automatic_step_without_training_and_then_anew(pack, model, pictures, trainings):
    first, _ = said(pack, model, pictures)
    said(pack, model, pictures, step=2)
    again, _ = said(pack, model, pictures, step=0)
    assert trainings == [0] and again[3] == first[3]
    assert_same(again[1], first[1])
    said(pack, model, pictures, step=0)
    assert trainings == [0, 0]


def test_other_images_drawn_before_are_no_other_training(pack, model, pictures, trainings):
    first, _ = said(pack, model, pictures, before=[torch.zeros(1, 64, 96, 3)])
    again, told = said(pack, model, pictures, before=[torch.ones(1, 64, 96, 3)])
    assert trainings == [0] and again[3] == first[3]
    assert "This step was kept, so nothing had to be trained." in told["text"][0]
    assert_same(again[1], first[1])
    said(pack, model, pictures, before=[torch.ones(1, 64, 96, 3)], seed=1)
    assert trainings == [0, 1]


def test_other_previews_are_drawn_by_another_training(pack, parts, model, pictures, trainings):
    before = [torch.zeros(1, 64, 96, 3)]
    for prompts in ("a cat", "a cat", "a dog", ""):
        previews = preview_settings(pack, parts, prompts=prompts) if prompts else None
        said(pack, model, pictures, previews, before=before)
    assert trainings == [0, 0]


def test_a_cancelled_training_is_not_given_again(pack, model, pictures, trainings, interrupt):
    before = [torch.zeros(1, 64, 96, 3)]
    with progress(lambda value, total, preview: interrupt() if value == 2 else None):
        said(pack, model, pictures, before=before)
    said(pack, model, pictures, before=before)
    assert trainings == [0, 0]


def test_the_images_drawn_before_are_shown_until_the_first_chart(pack, model, pictures):
    seen = []
    red = torch.tensor([1.0, 0.0, 0.0]).expand(1, 64, 96, 3)
    with progress(lambda value, total, preview: seen.append((value, preview))):
        said(pack, model, pictures, before=[red])
    (value, (_, shown, _)), *_ = seen
    assert value == 0 and shown.resize((3, 3)).getpixel((1, 1))[0] > 200
    assert shown.resize((3, 3)).getpixel((1, 1))[1] < 60


def test_a_step_that_was_not_kept_gives_the_nearest_and_says_so(pack, model, pictures, trainings):
    last, _ = said(pack, model, pictures)
    chosen, told = said(pack, model, pictures, step=90)
    assert trainings == [0] and "Step 90 was not kept; step 4, the nearest, is used." in told["text"][0]
    assert_same(chosen[1], last[1])


def test_a_step_that_is_asked_for_from_the_start_is_kept(pack, model, pictures, trainings):
    chosen, told = said(pack, model, pictures, steps=20, step=4)
    assert trainings == [0] and chosen[3].facts.chosen_step == 4 and len(chosen[3].losses) == 4
    assert "not kept" not in told["text"][0] and "had to be trained" not in told["text"][0]
    assert "Steps to choose from: 3, 4, 6, 9, 12, 15, 18, 20 (automatic)." in told["text"][0]


@pytest.mark.parametrize("change", [{"seed": 1}, {"steps": 5}, {"max_rank": 2}, {"ema_decay": 0.5}])
def test_another_setting_trains_anew(pack, model, pictures, trainings, change):
    said(pack, model, pictures)
    said(pack, model, pictures, step=2, **change)
    assert len(trainings) == 2


def test_another_model_trains_anew(pack, model, pictures, trainings):
    said(pack, model, pictures)
    patched = model.clone()
    patched.set_model_sampler_cfg_function(lambda given: given["cond"])
    said(pack, patched, pictures, step=2)
    assert len(trainings) == 2
    said(pack, patched, pictures, step=3)
    assert len(trainings) == 2
    styled = pack.nodes.host.apply_trained_lora(model, None, trained(pack, model, *pictures, **SETTINGS)[1])[0]
    before = len(trainings)
    said(pack, styled, pictures, step=2)
    assert len(trainings) == before + 1


def test_settings_that_only_change_the_speed_do_not_train_anew(pack, model, pictures, trainings):
    said(pack, model, pictures)
    said(pack, model, pictures, step=2, checkpointing="all", graph=False)
    assert trainings == [0]


@pytest.mark.parametrize("name", ["step_0000002.safetensors", "result.safetensors"])
def test_a_damaged_file_is_told_and_trained_again(pack, model, pictures, trainings, temp, name):
    said(pack, model, pictures)
    (file,) = kept_files(temp, name)
    file.write_bytes(file.read_bytes()[:-100])
    chosen, told = said(pack, model, pictures, step=2)
    assert trainings == [0, 0] and chosen[3].facts.chosen_step == 2
    assert "The kept steps of this training cannot be read" in told["text"][0] and name in told["text"][0]
    assert "so it was trained again" in told["text"][0]


def test_files_that_are_gone_are_trained_again(pack, model, pictures, trainings, temp):
    said(pack, model, pictures)
    (file,) = kept_files(temp, "step_0000002.safetensors")
    file.unlink()
    _, told = said(pack, model, pictures, step=2)
    assert trainings == [0, 0] and "step_0000002.safetensors was not found" in told["text"][0]
    shutil.rmtree(temp)
    said(pack, model, pictures, step=2)
    assert trainings == [0, 0, 0]


def test_the_steps_of_a_cancelled_training_can_be_chosen(pack, model, pictures, trainings, interrupt):
    with tiny.progress(lambda value, total, preview: interrupt() if value == 3 else None):
        _, told = said(pack, model, pictures, steps=16)
    assert "Cancelled at step 3" in told["text"][0] and "Steps to choose from: 2, 3 (auto" in told["text"][0]
    chosen, told = said(pack, model, pictures, steps=16, step=2)
    assert trainings == [0] and chosen[3].facts.chosen_step == 2
    assert "The training was cancelled before its end." in told["text"][0]
    _, told = said(pack, model, pictures, steps=16, step=10)
    assert trainings == [0, 0] and "as chosen" in told["text"][0]


def test_a_full_disk_does_not_cost_the_training(pack, model, pictures, monkeypatch):
    import importlib

    store = importlib.import_module(f"{pack.__name__}.aclora_core.training.candidate_store")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_atomically", fail)
    result, told = said(pack, model, pictures, step=2)
    assert len(result[3].losses) == 4 and "Not all steps could be kept to choose from" in told["text"][0]
    assert "Steps to choose from" not in told["text"][0]
