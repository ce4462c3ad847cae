"""Presets, and that what is written of them is what they do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from aclora_core.config import TrainConfig, preset_settings
from aclora_core.config.presets import LEARNING_RATES

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("images", "steps"), [(1, 640), (5, 640), (11, 640), (12, 1000), (25, 1000), (40, 1600), (100, 4000), (5000, 4000)]
)
def test_automatic_follows_the_number_of_images(images: int, steps: int) -> None:
    assert preset_settings("automatic", images, "SD3") == {"steps": steps}


def test_the_others_do_not_count_images() -> None:
    found = [preset_settings(each, 40, "SD3")["steps"] for each in ("few images", "usual", "many images")]
    assert found == [640, TrainConfig.steps, 4000]


def test_off_sets_nothing_and_an_unknown_one_is_refused() -> None:
    assert preset_settings("off", 5, "SDXL") == {}
    with pytest.raises(ValueError, match="preset must be off or automatic or .*, but is 'huge'"):
        preset_settings("huge", 5, "SDXL")  # type: ignore[arg-type]


def test_every_preset_is_a_valid_training() -> None:
    for model in (*LEARNING_RATES, "Unknown"):
        TrainConfig(**preset_settings("automatic", 100, model))


def test_the_help_page_lists_the_learning_rates_that_are_set() -> None:
    page = (ROOT / "nodes" / "web" / "docs" / "ACLoRALearningOptions.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (SD1\.5|SDXL|Flux\.1|Z-Image) \| ([0-9.]+) \|", page, re.MULTILINE))
    names = {"SD1.5": "SD15", "SDXL": "SDXL", "Flux.1": "Flux", "Z-Image": "ZImage"}
    assert {names[name]: float(rate) for name, rate in rows.items()} == LEARNING_RATES
