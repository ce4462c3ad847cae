"""Pictures over time: the files of previews, the sheet, and its marked rows, also after a cancel and a resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.host.training.test_previews import preview_settings
from tests.support import tiny_base as tiny
from tests.support.tiny_base import QUICK
from tests.support.train_node import run_node

# Fixtures: the tiny base, two images, and ComfyUI's Cancel.
parts, model, pictures, interrupt = tiny.parts, tiny.model, tiny.pictures, tiny.interrupt
SETTINGS = {"steps": 16, "learning_rate": 1e-2, "smallest": False}


@pytest.fixture(autouse=True)
def folders(pack, tmp_path, monkeypatch):
    """Empty temp and output folders, and previews that are drawn quickly; the returned folder holds both."""
    import folder_paths

    monkeypatch.setattr(pack.nodes.host.preview_sampling, "STEPS", 1)
    monkeypatch.setattr(pack.aclora_core.training.learned_style, "STEPS", 1)
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    return tmp_path


@pytest.fixture
def rows(pack, monkeypatch):
    """The rows of each sheet that was drawn."""
    drawn = []
    real = pack.nodes.training.sheet.step_sheet

    def draw(rows, prompts, dark):
        drawn.append(rows)
        return real(rows, prompts, dark)

    monkeypatch.setattr(pack.nodes.training.sheet, "step_sheet", draw)
    return drawn


def run(pack, model, pictures, previews, checkpoints=None, named="ink", **settings):
    """Run the node on a dataset of this name, and return what it shows."""
    latents, conditioning = pictures
    conditioning = [[[encoded, {**more, "aclora_dataset": named}] for encoded, more in each] for each in conditioning]
    options = {"previews": previews, "checkpoints": checkpoints}
    return run_node(pack, model, latents, conditioning, {**QUICK, **SETTINGS, **settings}, **options).ui


def sheets(shown):
    """The images that the node shows behind the picture of the training."""
    picture, *others = shown["images"]
    assert picture["type"] == "temp" or picture["filename"].startswith("training_")
    return others


def previews_of(pack, parts, every=3):
    return preview_settings(
        pack, parts, prompts="a red diamond\na blue ball", preview_every=every, preview_guidance=1.0
    )


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step_")) for path in folder.glob("step_*.png"))


def read(path: Path) -> torch.Tensor:
    """Read an image as (height, width, 3), 0 to 1."""
    with Image.open(path) as image:
        return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255)


def test_each_set_is_a_file_and_a_row_of_the_sheet(pack, parts, model, pictures, folders, rows):
    shown = run(pack, model, pictures, previews_of(pack, parts))
    folder = folders / "output" / "aclora" / "ink_00001"
    assert sheets(shown) == [{"filename": "sheet.png", "subfolder": "aclora/ink_00001", "type": "output"}]
    expected = [0, 2, 3, 4, 6, 8, 9, 10, 12, 14, 15, 16]  # candidates, and every third
    assert steps_in(folder) == expected and read(folder / "step_000003.png").shape == (128, 256, 3)
    assert sorted(path.name for path in folder.iterdir())[0] == "sheet.png" and len(list(folder.iterdir())) == 13
    marks = {row.label: row.remark for row in rows[0]}
    assert list(marks) == ["without the LoRA", *(f"step {step}" for step in expected[1:])]
    assert marks["step 3"] == "" and marks["step 4"] == "can be chosen" and marks["step 16"] == "automatic"
    assert [row.label for row in rows[0] if row.strong] == ["step 16"]
    assert "Previews of the steps: output/aclora/ink_00001." in shown["text"][0]
    assert "enter it as step and run again" in shown["text"][0]


def test_a_chosen_step_shows_the_same_sheet_with_another_mark(pack, parts, model, pictures, folders, rows):
    previews, ink = previews_of(pack, parts), folders / "output" / "aclora" / "ink_00001"
    saved = read(ink / run_image(pack, model, pictures, previews, steps=4)["filename"])
    (other,) = sheets(run(pack, model, pictures, previews, steps=4, step=2))
    marked = read(folders / "temp" / other["subfolder"] / other["filename"])
    assert other["type"] == "temp" and marked.shape == saved.shape
    assert [row.label for row in rows[1] if row.strong] == ["step 2", "step 4"]
    changed = (marked - saved).abs().amax((1, 2)) > 0.1
    assert 20 < changed.sum() < 0.3 * len(changed)
    names = sorted(path.name for path in (folders / "output" / "aclora").iterdir())
    assert names == ["ink_00001", "training_00001_.png"]
    # Without the preview options nothing is drawn, and what was drawn before is shown.
    assert run_image(pack, model, pictures, None, steps=4, step=2)["type"] == "temp"


def run_image(*arguments, **named):
    (image,) = sheets(run(*arguments, **named))
    return image


def test_after_a_cancel_and_a_resume_the_earlier_steps_are_in_the_sheet(
    pack, parts, model, pictures, folders, rows, interrupt
):
    checkpoints = pack.aclora_core.config.CheckpointConfig(folders / "checkpoints", 2)
    previews = previews_of(pack, parts)
    with tiny.progress(lambda value, total, preview: interrupt() if value == 7 else None):
        first = run_image(pack, model, pictures, previews, checkpoints)
    pack.nodes.host.clear_interrupt()  # the node shows step 7 once more
    folder = folders / "output" / "aclora" / "ink_00001"
    assert steps_in(folder) == [0, 2, 3, 4, 6] and first["subfolder"] == "aclora/ink_00001"
    before = (folder / "step_000003.png").read_bytes()
    # Another server, whose temp folder is empty: what is kept to choose from is gone, the pictures are not.
    pack.nodes.training.candidates._chosen_from.clear()
    for path in (folders / "temp").rglob("*.safetensors"):
        path.unlink()
    image = run_image(pack, model, pictures, previews, checkpoints)
    assert image["subfolder"] == "aclora/ink_00001" and (folder / "step_000003.png").read_bytes() == before
    assert {0, 2, 3, 4, 6, 9, 12, 15, 16} <= set(steps_in(folder))
    marks = {row.label: row.remark for row in rows[-1]}
    assert marks["step 4"] == "" and marks["step 8"] == "can be chosen" and marks["step 16"] == "automatic"
    assert all(row.images for row in rows[-1])


def test_another_training_of_the_same_dataset_gets_the_next_folder(pack, parts, model, pictures, folders):
    previews = previews_of(pack, parts, every=8)
    before = run_image(pack, model, pictures, previews, steps=2)["subfolder"]
    files = {path: path.read_bytes() for path in (folders / "output" / before).iterdir()}
    assert run_image(pack, model, pictures, previews, steps=2, seed=1)["subfolder"] == "aclora/ink_00002"
    assert all(path.read_bytes() == content for path, content in files.items())


@pytest.mark.parametrize("name", ["", "con", "a:b", "../up", "x" * 300, "x" * 190])
def test_a_dataset_without_a_name_for_files_gets_a_plain_one(pack, name):
    assert pack.nodes.training.candidates.training_name([[[None, {"aclora_dataset": name}]]]) == "training"


def test_a_full_disk_loses_previews_and_not_the_training(pack, parts, model, pictures, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    import importlib

    files = importlib.import_module(f"{pack.__name__}.aclora_core.training.preview_files")
    monkeypatch.setattr(files, "write_atomically", fail)
    shown = run(pack, model, pictures, previews_of(pack, parts), steps=2)
    assert "2 steps on 2 images" in shown["text"][0] and not sheets(shown)
    assert "Some previews could not be saved: Free some space" in shown["text"][0]


def test_a_sheet_that_cannot_be_saved_is_told(pack, parts, model, pictures, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack.nodes.training.sheet, "write_atomically", fail)
    shown = run(pack, model, pictures, previews_of(pack, parts), steps=2)
    assert not sheets(shown) and "The sheet of previews could not be saved" in shown["text"][0]


def test_the_name_is_that_of_the_first_image_that_has_one(pack):
    named = pack.nodes.training.candidates.training_name
    plain, ink = [[None, {}]], [[None, {"aclora_dataset": "ink"}]]
    assert named([plain, ink]) == "ink" and named([plain]) == "training"
