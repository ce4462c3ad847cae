"""Live previews in the real ComfyUI: their images, their lack of side effects, and failures."""

from __future__ import annotations

import logging

import pytest
import torch

from tests.support import tiny_base as tiny
from tests.support.tiny_base import caption, progress, trained, untouched

# Fixtures: the tiny base, two images, and ComfyUI's Cancel.
parts, model, pictures, interrupt = tiny.parts, tiny.model, tiny.pictures, tiny.interrupt
STEPS = 4  # of a preview
PROMPTS = "a red diamond, mine style\n\n  a blue ball  \n"


def preview_settings(pack, parts, prompts=PROMPTS, **changes):
    """Return the previews that the options node outputs."""
    inputs = {"preview_every": 2, "preview_prompts": prompts, "preview_guidance": 4.0, "clip": parts[1]}
    inputs["preview_share"] = 1.0  # an image takes longer than these few steps
    with torch.inference_mode():
        node = pack.nodes.training.options.previews.ACLoRAPreviewOptions
        return node.execute(**inputs | {"vae": parts[2]} | changes).result[0].previews


@pytest.fixture(autouse=True)
def quickly(pack, monkeypatch):
    """Previews and the drawings of unseen prompts at the end take few sampling steps."""
    monkeypatch.setattr(pack.nodes.host.preview_sampling, "STEPS", STEPS)
    monkeypatch.setattr(pack.aclora_core.training.learned_style, "STEPS", 1)


@pytest.fixture
def drawn(pack, monkeypatch):
    """The images of each preview, in order."""
    sets = []
    real = pack.nodes.training.display.host.sample_previews

    def draw(*arguments):
        sets.append(real(*arguments))
        return sets[-1]

    monkeypatch.setattr(pack.nodes.training.display.host, "sample_previews", draw)
    return sets


def test_previews_show_the_training_and_do_not_change_its_result(pack, parts, model, pictures, drawn):
    settings = {"learning_rate": 1e-2}
    shown = []
    with untouched(model), progress(lambda value, total, preview: shown.append(preview)):
        result = trained(pack, model, *pictures, preview_settings(pack, parts), steps=4, **settings)
    # Without the adapter, and at every step, as four steps give four candidates.
    assert [len(pictures) for pictures in drawn] == [2] * 5 and drawn[0][0].shape == (128, 128, 3)
    first, last = drawn[0], drawn[-1]
    assert (first[0] - last[0]).abs().mean() > 0.005 and (last[0] - last[1]).abs().mean() > 0.01
    charts = []
    with progress(lambda value, total, preview: charts.append(preview)):
        plain = trained(pack, model, *pictures, steps=4, **settings)
    for key, tensor in plain[1].items():
        assert torch.equal(tensor, result[1][key]), key
    assert "Previews took " in pack.nodes.training.status.training_summary(result[3])
    assert result[3].facts.preview_seconds > 0 and not result[3].facts.notes
    assert shown[-1][1].height > charts[-1][1].height  # images are below the chart


def test_disabled_previews_encode_and_sample_nothing(pack):
    node, options = (
        pack.nodes.training.options.previews.ACLoRAPreviewOptions,
        pack.nodes.training.options.options.Options,
    )
    given = {"preview_every": 2, "preview_prompts": "", "preview_guidance": 4.0, "clip": None, "previews": False}
    before = options({"steps": 5})
    assert node.execute(**given, options=before).result[0] is before
    assert node.execute(**given).result[0] == options()


def test_a_preview_equals_an_image_sampled_with_the_trained_model(pack, parts, model, pictures, drawn):
    import nodes

    settings = {"steps": 2, "learning_rate": 1e-2, "smallest": False}
    result = trained(pack, model, *pictures, preview_settings(pack, parts), **settings)
    positive, negative = caption(parts, "a red diamond, mine style"), caption(parts, "")
    found = []
    for chosen in (result[0], model):
        with torch.inference_mode():
            empty = {"samples": torch.zeros(1, 16, 16, 16)}
            latent = nodes.common_ksampler(chosen, 0, STEPS, 4.0, "euler", "simple", positive, negative, empty)
            found.append(parts[2].decode(latent[0]["samples"])[0])
    torch.testing.assert_close(drawn[-1][0], found[0].clamp(0, 1), rtol=0, atol=0.02)
    torch.testing.assert_close(drawn[0][0], found[1].clamp(0, 1), rtol=0, atol=0.02)  # without the adapter
    assert (drawn[-1][0] - found[1]).abs().mean() > 0.01


def test_latents_are_shown_without_a_vae(pack, parts, model, pictures, drawn):
    with untouched(model):
        trained(pack, model, *pictures, preview_settings(pack, parts, vae=None), steps=2)
    assert drawn[0][0].shape == (16, 16, 3) and 0.02 < drawn[0][0].std()


def test_previews_without_a_vae_get_a_remark(pack, parts):
    for vae, said in ((None, True), (parts[2], False)):
        shown = pack.nodes.training.display.LivePreviews(preview_settings(pack, parts, vae=vae))
        assert not shown.remark  # before the first image
        shown.images = [torch.zeros(8, 8, 3)]
        assert ("as no VAE is connected" in shown.remark) is said


def test_a_vae_that_does_not_fit_in_memory_is_not_used(pack, parts, model, pictures, drawn, monkeypatch):
    monkeypatch.setattr(pack.nodes.host.preview_sampling, "_fits", lambda *_: False)
    monkeypatch.setattr(pack.nodes.host.preview_sampling, "_free", lambda *_: 0)
    trained(pack, model, *pictures, preview_settings(pack, parts), steps=2)
    assert drawn[0][0].shape == (16, 16, 3)


def test_a_vae_that_fits_by_tiles_decodes_in_tiles(pack, parts, model, pictures, drawn, monkeypatch):
    tiles, vae = [], parts[2]
    decode = type(vae).decode_tiled

    def noted(self, samples, **sizes):
        tiles.append((samples.shape[-1], sizes["tile_x"]))
        return decode(self, samples, **sizes)

    monkeypatch.setattr(type(vae), "decode_tiled", noted)
    monkeypatch.setattr(pack.nodes.host.preview_sampling, "_fits", lambda *_: False)
    monkeypatch.setattr(pack.nodes.host.preview_sampling, "_TILE", 8)
    trained(pack, model, *pictures, preview_settings(pack, parts), steps=2)
    assert drawn[0][0].shape == (128, 128, 3) and set(tiles) == {(16, 8)}


def test_a_failing_sampler_ends_the_previews_only(pack, parts, model, pictures, monkeypatch, caplog):
    import comfy.samplers

    def fail(*_, **__):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(comfy.samplers, "sampling_function", fail)
    with untouched(model), caplog.at_level(logging.WARNING, logger="aclora"):
        result = trained(pack, model, *pictures, preview_settings(pack, parts), steps=4)
    assert "no preview could be drawn (no kernel image is available)" in caplog.text
    assert len(result[2]["loss"]) == 4 and "without previews" in result[3].facts.notes


def test_a_cancel_during_a_preview_keeps_the_adapter(pack, parts, model, pictures, interrupt, monkeypatch):
    import comfy.model_management
    import comfy.samplers

    real = comfy.samplers.sampling_function

    def press_cancel(*arguments, **named):
        interrupt()
        comfy.model_management.throw_exception_if_processing_interrupted()
        return real(*arguments, **named)

    monkeypatch.setattr(comfy.samplers, "sampling_function", press_cancel)
    with untouched(model):
        result = trained(pack, model, *pictures, preview_settings(pack, parts), steps=20)
    assert len(result[2]["loss"]) == 1 and not comfy.model_management.processing_interrupted()


@pytest.mark.parametrize(("prompts", "sentence"), [(" \n", "nothing to preview"), ("a ball\n" * 9, "has 9 lines")])
def test_too_few_or_too_many_prompts_are_refused(pack, parts, prompts, sentence):
    with pytest.raises(ValueError, match=sentence):
        preview_settings(pack, parts, prompts)


def test_previews_use_the_guidance_of_the_node(pack, parts, model, pictures, drawn):
    for guidance in (1.0, 6.0):
        trained(pack, model, *pictures, preview_settings(pack, parts, preview_guidance=guidance), steps=2)
    low, high = drawn[2], drawn[-1]  # both of step 2
    assert (low[0] - high[0]).abs().mean() > 0.005
