"""Training the text encoders of SDXL (CLIP L and OpenCLIP G) and SD2.1 (OpenCLIP H), with small random weights."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.host.host.test_text_encoder import difference
from tests.support.families import FAMILIES, Family, build, pictures, randomise
from tests.support.tiny_base import caption, trained, untouched

TEXT = "text_encoders."
WORDS = ("a red diamond, mine style", "a (blue:1.3) ball " + "on a quiet white page " * 20)
LEARNING = {"text_learning": 1.0, "learning_rate": 5e-3, "steps": 4}
# The widths add up to the families' caption width, G's is the pooled width; the penultimate layer gives the text.
SHAPES = {
    "SDXL": {"clip_l": {"hidden_size": 8}, "clip_g": {"hidden_size": 16}},
    "SD2.1": {"clip_h": {"hidden_size": 24}},
}
SMALL = {"num_hidden_layers": 3, "intermediate_size": 32, "num_attention_heads": 2}


def text_encoder(family: Family, shapes: dict[str, dict[str, int]]) -> Any:
    """Return the CLIP as a loader gives it, with random weights."""
    import comfy.sd
    import comfy.supported_models

    config = getattr(comfy.supported_models, family.config)(family.network)
    options = {f"{name}_model_config": SMALL | shape for name, shape in shapes.items()}
    with torch.inference_mode():
        clip = comfy.sd.CLIP(config.clip_target(), model_options=options)
        randomise(clip.cond_stage_model)
    return clip


@dataclass
class Learned:
    """A model and its text encoder, and the outputs of a training of both."""

    name: str
    family: Family
    model: Any
    clip: Any
    before: dict[str, Tensor]  # the text encoder's weights
    captions: list[Any]
    latents: list[dict[str, Tensor]]
    lora_model: dict[str, Tensor]
    changed: Any  # the CLIP with the adapter


@pytest.fixture(scope="module", params=SHAPES)
def learned(request, pack):
    family = FAMILIES[request.param]
    model, clip, (latents, _) = build(family), text_encoder(family, SHAPES[request.param]), pictures(family)
    before = {name: weight.clone() for name, weight in clip.cond_stage_model.state_dict().items()}
    captions = [pack.nodes.host.with_caption(caption((None, clip), text), text) for text in WORDS]
    with untouched(model):
        _, lora_model, _, _, changed = trained(
            pack, model, latents, captions, clip=clip, layers="attention and feed-forward", **LEARNING
        )
    return Learned(request.param, family, model, clip, before, captions, latents, lora_model, changed)


def text_keys(learned: Learned) -> list[str]:
    return [key for key in learned.lora_model if key.startswith(TEXT)]


def test_every_layer_that_affects_the_caption_is_trained(learned):
    parts = {key.removeprefix(TEXT).split(".self_attn")[0].split(".mlp")[0] for key in text_keys(learned)}
    assert len(parts) == 3 * len(SHAPES[learned.name])
    ups = [key for key in text_keys(learned) if key.endswith("lora_up.weight")]
    silent = [key for key in ups if not learned.lora_model[key].any()]
    # Captions are taken before the last layer; only G's pooled output uses it.
    assert len(silent) == 6 and all("clip_g" not in key and ".layers.2." in key for key in silent)


def test_the_stock_loader_uses_every_key_with_a_new_clip(learned, caplog):
    import comfy.sd

    fresh = text_encoder(learned.family, SHAPES[learned.name])
    with caplog.at_level(logging.WARNING), torch.inference_mode():
        model, clip = comfy.sd.load_lora_for_models(build(learned.family), fresh, learned.lora_model, 1.0, 1.0)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(clip.patcher.patches) == len(text_keys(learned)) // 3
    assert len(model.patches) + len(clip.patcher.patches) == len(learned.lora_model) // 3
    for words in WORDS:
        stock, ours, plain = (caption((None, each), words) for each in (clip, learned.changed, fresh))
        assert difference(stock, ours) == 0 and difference(stock, plain) > 0.1


def test_the_input_clip_is_unchanged(learned):
    # Encoded first: both CLIPs share weights, which ComfyUI leaves patched for the CLIP that it used last.
    assert difference(caption((None, learned.clip), WORDS[0]), learned.captions[0]) == 0
    after = learned.clip.cond_stage_model.state_dict()
    assert learned.before.keys() == after.keys()
    assert all(torch.equal(before, after[name]) for name, before in learned.before.items())
    assert not learned.clip.patcher.patches and not learned.clip.patcher.backup
    for module in learned.clip.cond_stage_model.modules():
        assert not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def test_training_encodes_captions_as_comfyui_does(pack, learned):
    session = pack.nodes.host.training_session(learned.model, learned.latents, learned.captions, learned.clip)
    with session as (frozen, _):
        for conditioning, text in zip(learned.captions, frozen.text.captions, strict=True):
            ((seen, more),) = frozen.text.encode(text)
            torch.testing.assert_close(seen, conditioning[0][0].clone(), rtol=1e-5, atol=1e-5)
            pooled = conditioning[0][1]["pooled_output"].clone()
            torch.testing.assert_close(more["pooled_output"], pooled, rtol=1e-5, atol=1e-5)
