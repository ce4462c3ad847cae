"""The preset of a training, applied by the training node."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from tests.support import tiny_base as tiny
from tests.support.train_node import run_node

parts, model, pictures = tiny.parts, tiny.model, tiny.pictures
QUICK = {"batch_size": 1, "max_rank": 1, "layers": "attention"}


@pytest.fixture
def short(pack: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images get three steps, so that a training with the preset is short."""
    monkeypatch.setattr(pack.aclora_core.config.presets, "FEW_STEPS", 3)


def test_it_sets_what_is_left_at_its_default(pack: ModuleType, model: Any, pictures: Any, short: None) -> None:
    output = run_node(pack, model, *pictures, {**QUICK, "steps": 1000}, preset="automatic")
    report = output.result[3]
    assert len(report.losses) == 3 and report.settings["steps"] == 3
    assert 'Preset "automatic": at most 3 steps, learning rate 0.0005.' in output.ui["text"][0]


def test_what_the_user_has_changed_stays(pack: ModuleType, model: Any, pictures: Any, short: None) -> None:
    output = run_node(pack, model, *pictures, {**QUICK, "steps": 2}, preset="few images")
    assert len(output.result[3].losses) == 2


def test_the_learning_rate_follows_the_model_unless_it_was_changed(pack: ModuleType) -> None:
    with_preset = pack.nodes.training.presets.with_preset
    set_by_it, remark = with_preset({"steps": 1000, "learning_rate": 5e-4}, "automatic", 40, "SDXL")
    assert set_by_it == {"steps": 1600, "learning_rate": 2e-4}
    assert remark == ' Preset "automatic": at most 1600 steps, learning rate 0.0002.'
    assert with_preset({"learning_rate": 1e-3}, "usual", 40, "SDXL")[0] == {"steps": 1000, "learning_rate": 1e-3}
    assert with_preset({"steps": 50}, "off", 40, "SDXL") == ({"steps": 50}, "")


def test_each_image_of_the_style_is_counted_once(pack: ModuleType) -> None:
    key = pack.nodes.host.VARIANT_KEY
    first, mirrored, plain, other = ({"samples": torch.zeros(1)} for _ in range(4))
    variants = [{**latent, key: {"picture": 0, "variant": number}} for number, latent in enumerate((first, mirrored))]
    repeats = [{**latent, key: {**latent[key], "picture": 1}} for latent in variants]
    regularisation = {**other, key: {"picture": 2, "variant": 0, "regularisation": 1.0}}
    assert pack.nodes.host.style_image_count([*variants, *repeats, plain, plain, regularisation]) == 2


def test_the_models_of_the_table_are_classes_of_comfyui(pack: ModuleType) -> None:
    import comfy.supported_models

    rates = pack.aclora_core.config.presets.LEARNING_RATES
    assert all(hasattr(comfy.supported_models, name) for name in rates)
