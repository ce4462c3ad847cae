"""What Train AC-LoRA says and shows: before the first step, at the end, after a cancel, in a run that was cancelled."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from tests.support import tiny_base as tiny
from tests.support.train_node import run_node

# Fixtures: the tiny base, two images, ComfyUI's Cancel.
parts, model, pictures, interrupt = tiny.parts, tiny.model, tiny.pictures, tiny.interrupt
SHORT: dict[str, Any] = {"steps": 2, "batch_size": 2, "max_rank": 4, "layers": "attention"}


@pytest.fixture
def cancelled(interrupt: Any) -> Any:
    """A training in which the user presses Cancel at the first step, and only then."""
    presses: list[int] = []

    def press(value: int, total: int, preview: Any) -> None:
        if not presses:
            presses.append(value)
            interrupt()

    return lambda: tiny.progress(press)


@pytest.fixture
def said(pack: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the node says, in order."""
    texts: list[str] = []
    monkeypatch.setattr(pack.nodes.host, "send_text", lambda text, node_id: texts.append(text))
    return texts


@pytest.fixture
def shown(pack: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that come with the progress bar, in order."""
    texts: list[str] = []
    monkeypatch.setattr(pack.nodes.host.progress, "send_text", lambda text, node_id: texts.append(text))
    return texts


def test_the_node_says_what_it_does_before_the_first_step_and_after_the_last(
    pack: ModuleType, model: Any, pictures: Any, said: list[str]
) -> None:
    run_node(pack, model, *pictures, SHORT)
    assert [text.split(",")[0].removesuffix(" …") for text in said[:-1]] == [
        "Loading the model",
        "Trying one step",
        "Measuring how much memory a step takes",
        "Measuring the loss",
        "First step",
        "Measuring the loss",  # at the last step
        "Truncating each layer to the rank it uses",
        "Counting the ranks of the layers",
    ]
    assert said[-1].startswith("It learned nothing") or said[-1].startswith("2 steps on 2 images")


def test_after_a_cancel_the_node_says_that_the_work_is_kept(
    pack: ModuleType, model: Any, pictures: Any, said: list[str], cancelled: Any
) -> None:
    with cancelled():
        shown = run_node(pack, model, *pictures, {**SHORT, "steps": 40}).ui
    told = "Cancelled: finishing what is under way. What was learned is kept."
    assert f"{told}\nTruncating each layer to the rank it uses …" in said
    headline = "Cancelled at step 1: the LoRA is what was learned so far. Run again to train from the start."
    assert said[-1] == shown["headline"][0] == headline  # the rest is in the picture
    assert "Run again to train from the start. Steps to choose from: 1 (automatic). To use another" in shown["text"][0]


def test_a_cancel_in_the_middle_of_a_long_step_is_noticed_at_once(pack: ModuleType, interrupt: Any) -> None:
    noticed, told = pack.nodes.training.cancels.noticed, threading.Event()
    with noticed(told.set):
        assert not told.wait(0.6)
        interrupt()
        assert told.wait(10)
    assert not [thread for thread in threading.enumerate() if thread.name == "AC-LoRA cancel"]


def test_the_picture_of_a_training_is_saved_and_is_the_first_image_on_the_node(
    pack: ModuleType, model: Any, pictures: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    shown = run_node(pack, model, *pictures, SHORT).ui["images"]
    assert [(image["subfolder"], image["type"]) for image in shown] == [("aclora", "output")]
    (saved,) = tmp_path.rglob("training_*.png")
    assert saved.name == shown[0]["filename"]
    with Image.open(saved) as picture:
        assert picture.width == pack.aclora_core.inspection.charts.training_picture.WIDTH and picture.height > 500


def test_a_full_disk_costs_the_picture_and_not_the_training(
    pack: ModuleType, model: Any, pictures: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack.nodes.training.display.ui.ImageSaveHelper, "get_save_images_ui", full)
    result = run_node(pack, model, *pictures, SHORT)
    assert result.ui["images"] == [] and "The picture of the training could not be saved (" in result.ui["text"][0]
    assert any(tensor.any() for key, tensor in result.result[1].items() if "lora_up" in key)


def test_images_without_the_style_may_be_grey_or_transparent(
    pack: ModuleType, model: Any, pictures: Any, shown: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    drawn: list[Any] = []
    before = [torch.rand(2, 8, 8, 1), torch.rand(1, 8, 16, 4), torch.full((1, 8, 8, 3), torch.nan)]
    with tiny.progress(lambda value, total, preview: drawn.append(preview)):
        run_node(pack, model, *pictures, {**SHORT, "seed": 31}, before)
    assert "Drawn without the style, before the training" in shown and drawn[0][1].height > 200
    assert "could not be drawn" not in caplog.text


def test_what_cannot_be_shown_before_a_training_does_not_end_it(
    pack: ModuleType,
    model: Any,
    pictures: Any,
    shown: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("no room for a sheet")

    monkeypatch.setattr(pack.nodes.training.display, "contact_sheet", fail)
    result = run_node(pack, model, *pictures, {**SHORT, "seed": 32}, [torch.rand(1, 8, 8, 3)])
    assert len(result.result[2]["loss"]) == 2 and "Drawn without the style, before the training" not in shown
    assert caplog.text.count("pictures on the node could not be drawn") == 1 and len(result.ui["images"]) == 1


def test_a_chart_that_cannot_be_drawn_does_not_end_a_training(
    pack: ModuleType,
    model: Any,
    pictures: Any,
    shown: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no room for a picture")

    monkeypatch.setattr(pack.nodes.training.display, "_CHART_INTERVAL", -1.0)  # one for each step
    monkeypatch.setattr(pack.nodes.training.display, "training_picture", fail)
    bars: list[int] = []
    with tiny.progress(lambda value, total, preview: bars.append(value)):
        result = run_node(pack, model, *pictures, {**SHORT, "steps": 4, "seed": 33})
    assert len(result.result[2]["loss"]) == 4 and bars == [1, 2, 3, 4]
    assert len([text for text in shown if text.startswith("training, loss")]) == 4
    assert caplog.text.count("pictures on the node could not be drawn") == 1
    told = "The picture of the training could not be drawn (no room for a picture)."
    assert result.ui["images"] == [] and told in result.ui["text"][0]


def test_comfyuis_interrupt_passes_through_a_chart(pack: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy.model_management import InterruptProcessingException

    def interrupted(*_: object) -> None:
        raise InterruptProcessingException

    display = pack.nodes.training.display
    monkeypatch.setattr(display, "training_picture", interrupted)
    show = display.TrainingDisplay(pack.nodes.host.ProgressBar(2), display.LivePreviews(None), lambda text: None)
    with pytest.raises(InterruptProcessingException):
        show(display.Progress(2, 1, losses=[0.5]))


@pytest.mark.parametrize(
    ("settings", "dark"),
    [
        (None, True),
        ({}, True),
        ({"Comfy.ColorPalette": "nord"}, True),
        ({"Comfy.ColorPalette": "light"}, False),
        ({"Comfy.ColorPalette": "paper", "Comfy.CustomColorPalettes": {"paper": {"light_theme": True}}}, False),
        ("[", True),
    ],
    ids=["no file", "unset", "dark", "light", "own light", "damaged"],
)
def test_pictures_are_as_dark_as_comfyui(
    pack: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: Any, dark: bool
) -> None:
    import folder_paths

    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))
    if settings is not None:
        (tmp_path / "default").mkdir()
        text = settings if isinstance(settings, str) else json.dumps(settings)
        (tmp_path / "default" / "comfy.settings.json").write_text(text, encoding="utf-8")
    assert pack.nodes.host.dark_theme() is dark


def test_a_cancel_changes_what_comfyui_compares_for_this_node_only(
    pack: ModuleType, model: Any, pictures: Any, cancelled: Any
) -> None:
    cancels = pack.nodes.training.cancels
    before, other = cancels.cancel_count(None), cancels.cancel_count("another")
    run_node(pack, model, *pictures, SHORT)
    assert cancels.cancel_count(None) == before
    with cancelled():
        run_node(pack, model, *pictures, {**SHORT, "steps": 40})
    assert cancels.cancel_count(None) == before + 1 and cancels.cancel_count("another") == other


def test_a_training_of_a_cancelled_run_does_not_begin(
    pack: ModuleType, model: Any, pictures: Any, cancelled: Any, said: list[str]
) -> None:
    from comfy_execution.utils import CurrentNodeContext

    with CurrentNodeContext("one run", "5"), cancelled():
        first = run_node(pack, model, *pictures, {**SHORT, "steps": 40})
    assert any(tensor.any() for tensor in first.result[1].values() if isinstance(tensor, torch.Tensor))
    said.clear()
    with CurrentNodeContext("one run", "6"):
        second = run_node(pack, model, *pictures, SHORT)
    assert said == ["Not trained, as this run was cancelled before. Run again to train."]
    assert {type(output).__name__ for output in second.result} == {"ExecutionBlocker"}
    with CurrentNodeContext("another run", "6"):
        third = run_node(pack, model, *pictures, SHORT)
    assert len(third.result[2]["loss"]) == 2


def test_an_error_is_told_on_its_node_before_comfyui_gets_it(pack: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy_execution.utils import CurrentNodeContext

    texts: list[tuple[str, str]] = []
    errors = pack.nodes.host.told_errors
    monkeypatch.setattr(errors, "send_text", lambda text, node_id: texts.append((text, node_id)))
    layers = errors.tell_errors(pack.nodes.training.options.layers.ACLoRALayerOptions)
    checkpoints = pack.nodes.training.options.checkpoints.ACLoRACheckpointOptions
    with CurrentNodeContext("run", "12"):
        layers.execute(include_layers="attn")
        assert checkpoints.validate_inputs("ink") is True and not texts
        with pytest.raises(ValueError, match="include_layers"):
            layers.execute(include_layers="(")
        assert "leads outside" in checkpoints.validate_inputs("../ink")
    (raised, node), (refused, _) = texts
    assert raised.startswith("⚠ include_layers: ") and node == "12" and refused.startswith("⚠ '../ink' leads outside")


def test_the_node_says_the_first_two_sentences_beside_the_picture_of_all(pack: ModuleType) -> None:
    headline = pack.nodes.training.status.headline
    whole = "9 steps on 16 images. Stopped by itself: the loss fell to 17 % of the base model's. Truncated to rank 8.5."
    assert headline(whole, False) == whole.removesuffix(" Truncated to rank 8.5.")
    assert headline("The LoRA is that of step 7, as chosen.", False) == "The LoRA is that of step 7, as chosen."
