"""bench.quickstart_trials.studio with the real tiny base: a training of two steps, and what it draws."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bench.quickstart_trials import studio
from bench.quickstart_trials.studio import Host, opened
from bench.quickstart_trials.trials import Drawing, Trial
from tools.tiny_base import icons

CONCEPTS = ("owl", "rocket", "house")


@pytest.fixture(scope="module")
def drawings(pack, tmp_path_factory):
    """What is drawn before and after a training of black squares, by the way of drawing, and the training's result."""
    patch = pytest.MonkeyPatch()
    patch.setattr(icons, "load_set", lambda cache, style: {concept: concept for concept in CONCEPTS})
    patch.setattr(icons, "render", lambda svg: np.zeros((128, 128, 3), np.uint8))
    patch.setattr(studio, "DRAWING_STEPS", 3)
    try:
        with torch.inference_mode():
            host = Host(pack, *pack.nodes.tiny_base.ACLoRATinyBase.execute().result)
        trial = Trial("3 images", "{thing}, fluent style", CONCEPTS, {"steps": 2, "smallest": False})
        with opened(host, Path(), trial, trial.captions(["castle", "guitar"])) as open_studio:
            base = open_studio.draw(None, Drawing())
            result = open_studio.train(trial, 7)
            ways = {"whole": Drawing(), "none": Drawing(strength=1e-6), "guided": Drawing(guidance=3)}
            drawn = {name: open_studio.draw(result.adapter, way) for name, way in ways.items()}
    finally:
        patch.undo()
    return {"base": base, **drawn}, result


def test_every_prompt_is_drawn(drawings):
    for images in drawings[0].values():
        assert images.shape == (2, 128, 128, 3) and torch.isfinite(images).all()
        assert images.min() >= 0 and images.max() <= 1


def test_with_hardly_any_strength_the_base_draws_and_with_the_whole_the_adapter(drawings):
    images, result = drawings
    assert result.report.facts.steps_run == 2
    torch.testing.assert_close(images["none"], images["base"], rtol=0, atol=1e-3)
    assert (images["whole"] - images["base"]).abs().mean() > 0.001


def test_guidance_changes_what_is_drawn(drawings):
    images, _ = drawings
    assert (images["guided"] - images["whole"]).abs().mean() > 0.01
