"""The verdict on the prompts of AC-LoRA Preview Options, in the real ComfyUI."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.host.training.test_previews import preview_settings
from tests.support import tiny_base as tiny
from tests.support.tiny_base import LONG, SHORT, caption, trained, untouched

# Fixtures: the tiny base, two images, and ComfyUI's Cancel.
parts, model, pictures, interrupt = tiny.parts, tiny.model, tiny.pictures, tiny.interrupt


def verdict_settings(pack, parts, prompts=f"a green star, mine style\n{LONG}", **changes):
    """Return previews that come too rarely for a short training."""
    return preview_settings(pack, parts, prompts, preview_every=1000, **changes)


def only_prompts(pack, monkeypatch):
    """Sample no previews for the sheet of steps, which take most of the time of a short training."""
    monkeypatch.setattr(pack.nodes.training.display.host, "sample_previews", lambda *arguments: [])


@pytest.mark.parametrize("with_text_encoder", [False, True])
def test_prompts_of_the_previews_get_a_verdict(pack, parts, model, pictures, with_text_encoder, monkeypatch):
    only_prompts(pack, monkeypatch)
    settings = {"steps": 4, "learning_rate": 1e-2}
    more = {}
    if with_text_encoder:
        captions = SHORT, "a blue ball, mine style"
        with_caption = pack.nodes.host.text_encoder.with_caption
        pictures = pictures[0], [with_caption(*pair) for pair in zip(pictures[1], captions, strict=True)]
        more = {"clip": parts[1]}
        settings["text_learning"] = 0.5
    with untouched(model):
        _, lora, _, report, _ = trained(pack, model, *pictures, verdict_settings(pack, parts), **more, **settings)
    facts = report.facts
    assert facts.unseen_prompts == 2 and facts.copied_share is None and not facts.notes  # two images tell no copies
    assert -1 <= facts.style_gained <= 1 and facts.style_gained != 0
    assert math.isfinite(facts.content_kept) and 0.3 < facts.content_kept < 1
    assert "On 2 unseen prompts: style 0.00 → " in pack.nodes.training.status.training_summary(report)
    plain = trained(pack, model, *pictures, **more, **settings)
    assert plain[3].facts.style_gained is None and plain[3].facts.unseen_prompts is None
    assert all(torch.equal(lora[key], tensor) for key, tensor in plain[1].items())


def test_prompts_of_another_text_encoder_cost_the_verdict_alone(pack, parts, model, pictures, monkeypatch, caplog):
    only_prompts(pack, monkeypatch)
    previews = verdict_settings(pack, parts)
    previews = replace(
        previews, conditionings=[[[encoded[..., :3], more]] for ((encoded, more),) in previews.conditionings]
    )
    report = trained(pack, model, *pictures, previews, steps=2)[3]
    assert len(report.losses) == 2 and report.facts.style_gained is None
    assert "Images of unseen prompts could not be measured" in report.facts.notes


def test_a_cancel_while_prompts_are_drawn_keeps_the_training(pack, parts, model, pictures, interrupt, monkeypatch):
    import comfy.model_management

    only_prompts(pack, monkeypatch)
    learned_style = pack.aclora_core.training.train.__globals__["add_learned_style"].__globals__
    draw = learned_style["draw_latents"]

    def cancelling(*arguments):
        interrupt()
        return draw(*arguments)

    monkeypatch.setitem(learned_style, "draw_latents", cancelling)
    report = trained(pack, model, *pictures, verdict_settings(pack, parts), steps=2)[3]
    assert report.facts.style_gained is None and report.facts.cancelled is None and len(report.losses) == 2
    assert not comfy.model_management.processing_interrupted()


def test_prompts_are_rows_of_their_own(pack, parts, model, pictures):
    """They change neither what is learned from nor the captions' lengths."""
    latents, captions = pictures
    with torch.inference_mode():
        with pack.nodes.host.training_session(model, latents, captions) as (_, plain):
            keys = list(plain.batch_keys)
        prompts = [caption(parts, LONG), caption(parts, SHORT)]
        with pack.nodes.host.training_session(model, latents, captions, None, captions[0], prompts) as (_, images):
            assert images.prompts == [4, 5] and images.without_caption == {0: 2, 1: 3}
            assert images.batch_keys[:2] == keys and images.commonest_shape == tuple(plain.latents[0].shape)
            assert not images.latents[4].any() and len(images.latents) == len(images.batch_keys) == 6
            images.conditioning([4]), images.conditioning([5, 0])
