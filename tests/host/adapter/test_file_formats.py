"""Saved files in every format, for small models of every family: ComfyUI's own loader and ours use every key."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.host.host.test_text_encoder_families import text_encoder
from tests.support import family_sizes as sizes
from tests.support.families import FAMILIES, Family, build
from tests.support.random_lora import random_lora

# With the blocks of the real models, which their names count.
_SD1 = {
    "num_res_blocks": [2, 2],
    "channel_mult": [1, 1],
    "transformer_depth": [1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 0, 0, 0],
}
_SDXL = _SD1 | {"transformer_depth": [0, 0, 2, 2], "transformer_depth_output": [0, 0, 0, 2, 2, 2]}
_WIDE = sizes.SD3["context_embedder_config"] | {"params": {"in_features": 24, "out_features": 128}}
DEEPER = {
    "SD1.5": _SD1,
    "SD2.1": _SD1,
    "SDXL": _SDXL,
    "SDXL inpainting": _SDXL,
    "SDXL InstructPix2Pix": _SDXL,
    "SD3": {"depth": 2, "context_embedder_config": _WIDE},
}
_SAME_AS_ANOTHER = {"SDXL in fp16", "Playground 2.5", "SD3 in fp8", "SD3 in fast fp8", "SD3.5"}
_NAMES = sorted(FAMILIES.keys() - _SAME_AS_ANOTHER)
# Families whose layers all have a name in diffusers that ComfyUI reads.
IN_DIFFUSERS = {
    *("SD1.5", "SD2.1", "SDXL", "SDXL inpainting", "SDXL InstructPix2Pix", "KOALA", "SD3", "Flux.1", "Flux.1 schnell"),
    *("Flux.1 Fill", "Z-Image", "Qwen-Image", "AuraFlow", "PixArt Alpha", "PixArt Sigma", "Krea 2", "HiDream"),
    *("Kandinsky 5", "Kandinsky 5 Image", "ERNIE-Image"),
}
IN_KOHYA = {"SD1.5", "SD2.1", "SDXL", "SDXL inpainting", "SDXL InstructPix2Pix", "KOALA"}


@pytest.fixture(scope="module", params=_NAMES)
def case(request, pack) -> Any:
    family = FAMILIES[request.param]
    family = replace(family, network=family.network | DEEPER.get(request.param, {}))
    model = build(family)
    return request.param, family, model, lora_for(pack, model)


def lora_for(pack, model) -> dict[str, Tensor]:
    """A random LoRA of all layers that a training adapts."""
    layers = pack.aclora_core.lora.targets.preset_layers(model.model.diffusion_model, "all", "diffusion_model.")
    return random_lora({name: layer.weight.shape for name, layer in layers.items()})


def report_of(pack, family: Family) -> Any:
    """A report of a training of this family, which says nothing else."""
    adapter = pack.aclora_core.adapter
    return adapter.RankReport({}, [], [], [], {}, {}, facts=adapter.TrainingFacts(base_model=family.config))


def saved(pack, case, file_format: str) -> Any:
    _, family, _, state = case
    node = pack.nodes.adapter.save.ACLoRASave
    return node.execute(state, "it", precision="fp32", rank_report=report_of(pack, family), format=file_format)


def patched(model, changed) -> dict[str, Tensor]:
    """The weights that a loader changed, as sampling sees them."""
    import comfy.lora

    weights = model.model.state_dict()
    return {
        name: comfy.lora.calculate_weight(patches, weights[name].float().clone(), name)
        for name, patches in changed.patches.items()
    }


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("file_format", ["automatic", "ComfyUI", "kohya", "diffusers"])
def test_both_loaders_use_every_key_and_change_the_weights_alike(pack, loras, case, file_format, caplog):
    import comfy.sd
    import comfy.utils

    import nodes

    name, family, model, state = case
    if file_format == "diffusers" and name not in IN_DIFFUSERS:
        with pytest.raises(ValueError, match="has no name in the format diffusers.*Choose the format ComfyUI or kohya"):
            saved(pack, case, file_format)
        assert not list(loras.iterdir())
        return
    expected = patched(model, comfy.sd.load_lora_for_models(model, None, state, 1.0, 0.0)[0])
    assert len(expected) == len(state) // 3
    lora_name = saved(pack, case, file_format)[0]
    with caplog.at_level(logging.WARNING):
        (by_host,) = nodes.LoraLoaderModelOnly().load_lora_model_only(model, lora_name, 1.0)
        by_ours = pack.nodes.adapter.load.ACLoRALoad.execute(lora_name, model=model)
    assert not caplog.records
    assert_same_weights(patched(model, by_host), expected)
    assert_same_weights(patched(model, by_ours[0]), expected)
    assert by_ours[2].keys() == state.keys(), "our loader gives the layers of the training"


def test_the_automatic_format_is_the_one_that_most_programs_read(pack, loras, case):
    import comfy.utils

    name = case[0]
    written, metadata = comfy.utils.load_torch_file(
        str(loras / saved(pack, case, "automatic")[0]), return_metadata=True
    )
    expected = "kohya" if name in IN_KOHYA else "diffusers" if name in IN_DIFFUSERS else "ComfyUI"
    assert metadata["aclora.format"] == expected
    prefix = {"kohya": "lora_unet_", "diffusers": ("transformer.", "unet."), "ComfyUI": "diffusion_model."}[expected]
    assert all(key.startswith(prefix) for key in written)


# The widths of the parts of each CLIP.
CLIPS = {
    "SD1.5": {"clip_l": {"hidden_size": 24}},
    "SD2.1": {"clip_h": {"hidden_size": 24}},
    "SDXL": {"clip_l": {"hidden_size": 8}, "clip_g": {"hidden_size": 16}},
}


@pytest.mark.parametrize("file_format", ["automatic", "ComfyUI", "diffusers"])
@pytest.mark.parametrize("name", CLIPS)
def test_text_encoders_are_read_by_both_loaders_from_every_format(pack, loras, name, file_format, caplog):
    import comfy.sd

    import nodes

    family = FAMILIES[name]
    model, clip = build(family), text_encoder(family, CLIPS[name])
    # diffusers has no name for CLIP's last layer, nor has kohya for that of SD2, which does not affect its captions.
    preset = "all" if file_format != "diffusers" and name != "SD2.1" else "attention and feed-forward"
    layers = pack.aclora_core.lora.targets.preset_layers(clip.cond_stage_model, preset, "text_encoders.")
    state = random_lora({base: layer.weight.shape for base, layer in layers.items()})
    expected = patched(clip.patcher, comfy.sd.load_lora_for_models(model, clip, state, 1.0, 1.0)[1].patcher)
    assert len(expected) == len(layers)
    saved_name = saved(pack, (name, family, model, state), file_format)[0]
    with caplog.at_level(logging.WARNING):
        _, by_host = nodes.LoraLoader().load_lora(model, clip, saved_name, 1.0, 1.0)
        by_ours = pack.nodes.adapter.load.ACLoRALoad.execute(saved_name, model=model, clip=clip)[1]
    assert not caplog.records
    assert_same_weights(patched(clip.patcher, by_host.patcher), expected)
    assert_same_weights(patched(clip.patcher, by_ours.patcher), expected)
