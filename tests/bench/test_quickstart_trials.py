"""bench.quickstart_trials: what is tried, what is drawn, and the table. The icons are made up."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from bench.quickstart_trials import __main__ as script
from bench.quickstart_trials import trials
from bench.quickstart_trials.studio import Guided
from bench.quickstart_trials.trials import TRIALS, Drawing, Trial, verdict_concepts
from tools.tiny_base import icons

ROW = {"trial": "a", "seed": 7, "style": 0.9, "concept_in_five": 0.8, "concept": 0.5, "steps": 560, "seconds": 61.4}


def test_no_trial_learns_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 300 things that both sets have, the first 48 in a random order are left out, and all that are learned."""
    learned = {concept for trial in TRIALS for concept in trial.concepts}
    things = sorted(learned) + [f"thing {number}" for number in range(300)]
    monkeypatch.setattr(icons, "load_set", lambda cache, style: dict.fromkeys(things, ""))
    found = verdict_concepts(Path())
    assert len(found) == len(set(found)) == trials.VERDICT and set(found) <= set(things)
    assert not learned & set(found)
    assert not learned & set(trials.shown_concepts())


def test_trials_have_different_names_and_as_many_images_as_they_say() -> None:
    names = [trial.name for trial in TRIALS]
    assert len(set(names)) == len(names)
    for trial in TRIALS:
        assert trial.name.startswith(f"{len(trial.concepts)} ") and len(set(trial.concepts)) == len(trial.concepts)


def test_captions_hold_the_thing_with_its_article() -> None:
    assert Trial("", "fluent style, {thing}").captions(["owl", "rocket"]) == [
        "fluent style, an owl",
        "fluent style, a rocket",
    ]


def test_a_way_of_drawing_is_named_by_what_is_unusual() -> None:
    drawings = [Drawing(), Drawing(strength=1.2), Drawing(strength=0.8, guidance=2)]
    assert [str(drawing) for drawing in drawings] == ["", "strength 1.2", "strength 0.8, guidance 2"]


def test_trials_are_chosen_by_patterns() -> None:
    assert script.chosen(None) == list(TRIALS)
    assert [trial.name for trial in script.chosen(["16 images", "24 images, n*"])] == ["16 images", "24 images, noto"]


def test_guidance_goes_beyond_the_conditional_prediction() -> None:
    network = SimpleNamespace(
        objective=None, device=torch.device("cpu"), denoise=lambda noisy, sigma, conditioning: noisy * 0 + conditioning
    )
    noisy = torch.zeros(2, 3)
    for guidance, wanted in ((1.0, 5.0), (3.0, 11.0), (0.0, 2.0)):
        guided = Guided(network, 2.0, guidance)
        assert torch.equal(guided.denoise(noisy, torch.ones(2), 5.0), torch.full((2, 3), wanted))


def test_the_table_of_a_file_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"rows": [ROW, {**ROW, "trial": "b", "style": 0.123}]}))
    monkeypatch.setattr("sys.argv", ["quickstart_trials", "--table", str(path)])
    script.main()
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| a | 7 | 0.90 | 0.80 | 0.50 | 560 | 61 |",
        "| b | 7 | 0.12 | 0.80 | 0.50 | 560 | 61 |",
    ]


def test_a_sheet_has_a_cell_for_each_drawing(tmp_path: Path) -> None:
    drawn = np.zeros((13, 128, 128, 3), np.float32)
    script.save_sheet(drawn, tmp_path / "new" / "sheet.png")
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        assert sheet.size == (12 * 64, 2 * 64)
        assert sheet.getpixel((30, 100)) == (0, 0, 0) and sheet.getpixel((200, 100)) == (255, 255, 255)
