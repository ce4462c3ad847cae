"""Saved files in diffusers: a tiny pipeline with the file gives what ComfyUI gives with the same weights and LoRA."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.host.adapter.test_file_formats import DEEPER, patched, report_of
from tests.host.host.test_text_encoder_families import text_encoder
from tests.support.families import FAMILIES, Family, build
from tests.support.random_lora import random_lora

CLIP_SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "intermediate_size": 32, "num_attention_heads": 2}
POOLED = 16  # width of the pooled caption


@dataclass
class Tiny:
    """The same random weights in ComfyUI and in diffusers."""

    family: Family
    model: Any  # ComfyUI's MODEL
    clip: Any  # ComfyUI's CLIP
    pipeline: Any
    denoiser: nn.Module  # diffusers'
    inputs: tuple[dict[str, Tensor], dict[str, Any]]  # of ComfyUI's network and of diffusers'


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def tiny(request, pack) -> Tiny:
    family = FAMILIES[request.param]
    family = replace(family, network=family.network | DEEPER.get(request.param, {}))
    torch.manual_seed(0)
    return {"SD1.5": _sd15, "SDXL": _sdxl, "Flux.1": _flux}[request.param](family)


def _sd15(family: Family) -> Tiny:
    from diffusers import StableDiffusionPipeline

    model = build(family)
    clip = text_encoder(family, {"clip_l": CLIP_SIZES})
    unet = _unet(
        model,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8,
    )
    pipeline = StableDiffusionPipeline(
        None, _clip_of(clip, "clip_l"), None, unet, None, None, None, requires_safety_checker=False
    )
    comfyui, diffusers = _unet_inputs()
    return Tiny(family, model, clip, pipeline, unet, (comfyui, diffusers))


def _sdxl(family: Family) -> Tiny:
    from diffusers import StableDiffusionXLPipeline

    family = replace(family, network=family.network | {"transformer_depth_middle": 2})
    model = build(family)
    clip = text_encoder(family, {"clip_l": CLIP_SIZES | {"hidden_size": 8}, "clip_g": CLIP_SIZES | {"hidden_size": 16}})
    unet = _unet(
        model,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=1,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=POOLED + 6 * 256,
    )
    encoders = _clip_of(clip, "clip_l"), _clip_of(clip, "clip_g")
    pipeline = StableDiffusionXLPipeline(None, *encoders, None, None, unet, None, add_watermarker=False)
    comfyui, diffusers = _unet_inputs()
    pooled, sizes = torch.randn(1, POOLED), torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    comfyui["y"] = torch.cat([pooled, unet.add_time_proj(sizes.flatten()).reshape(1, -1)], 1)
    diffusers["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
    return Tiny(family, model, clip, pipeline, unet, (comfyui, diffusers))


def _unet(model: Any, **config: Any) -> nn.Module:
    import comfy.utils
    from diffusers import UNet2DConditionModel

    channels = model.model.model_config.unet_config["model_channels"]
    unet = UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=(channels, channels),
        layers_per_block=2,
        cross_attention_dim=24,
        **config,
    )
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    return _with_weights(unet, names, model.model.diffusion_model.state_dict())


def _unet_inputs() -> tuple[dict[str, Tensor], dict[str, Any]]:
    noisy, step, text = torch.randn(1, 4, 8, 8), torch.tensor([500.0]), torch.randn(1, 7, 24)
    comfyui = {"x": noisy, "timesteps": step, "context": text}
    return comfyui, {"sample": noisy, "timestep": step, "encoder_hidden_states": text}


def _flux(family: Family) -> Tiny:
    import comfy.utils
    from diffusers import FluxPipeline, FluxTransformer2DModel

    model = build(family)
    clip = text_encoder(FAMILIES["SD1.5"], {"clip_l": CLIP_SIZES})  # Flux's other encoder is not trained
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=POOLED,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    names = comfy.utils.flux_to_diffusers(model.model.model_config.unet_config)
    _with_weights(transformer, names, model.model.diffusion_model.state_dict())
    pipeline = FluxPipeline(None, None, _clip_of(clip, "clip_l"), None, None, None, transformer)
    noisy, sigma, text, pooled = (
        torch.randn(1, 16, 8, 8),
        torch.tensor([0.5]),
        torch.randn(1, 7, 24),
        torch.randn(1, POOLED),
    )
    guidance = torch.tensor([3.5])
    comfyui = {"x": noisy, "timestep": sigma, "context": text, "y": pooled, "guidance": guidance}
    diffusers = {
        "hidden_states": FluxPipeline._pack_latents(noisy, 1, 16, 8, 8),
        "timestep": sigma,
        "encoder_hidden_states": text,
        "pooled_projections": pooled,
        "guidance": guidance,
        "img_ids": FluxPipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32),
        "txt_ids": torch.zeros(7, 3),
    }
    return Tiny(family, model, clip, pipeline, transformer, (comfyui, diffusers))


def _with_weights(network: nn.Module, names: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    """Give one of diffusers' networks the weights of ComfyUI's, by ComfyUI's own table of names."""
    state = {}
    for name in network.state_dict():
        place, *more = (names[name],) if isinstance(names[name], str) else names[name]
        weight = weights[place]
        if more and more[0] is not None:
            weight = weight.narrow(*more[0])
        state[name] = more[1](weight) if len(more) > 1 else weight
    network.load_state_dict(state)
    return network.eval()


def _clip_of(clip: Any, part: str) -> nn.Module:
    """Return one text encoder of a CLIP as transformers' model."""
    from transformers import CLIPTextConfig, CLIPTextModel

    weights = getattr(clip.cond_stage_model, part).transformer.state_dict()
    width = weights["text_model.final_layer_norm.weight"].shape[0]
    act = "quick_gelu" if part == "clip_l" else "gelu"
    config = CLIPTextConfig(**(CLIP_SIZES | {"hidden_size": width}), hidden_act=act, vocab_size=49408)
    model = CLIPTextModel(config)
    known = model.state_dict().keys()
    named = {name if name in known else name.removeprefix("text_model."): weight for name, weight in weights.items()}
    model.load_state_dict({name: weight for name, weight in named.items() if name in known})
    return model.eval()


def _lora_for(pack: Any, tiny: Tiny) -> dict[str, Tensor]:
    layers = pack.aclora_core.lora.targets.preset_layers
    model = layers(tiny.model.model.diffusion_model, "all", "diffusion_model.")
    text = layers(tiny.clip.cond_stage_model, "attention and feed-forward", "text_encoders.")
    return random_lora({name: layer.weight.shape for name, layer in (model | text).items()}, size=0.1)


def denoised(tiny: Tiny, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the outputs of ComfyUI's network with these weights in place of its own, and of diffusers'."""
    comfyui, diffusers = tiny.inputs
    network = tiny.model.model.diffusion_model
    own = {name.removeprefix("diffusion_model."): weight for name, weight in weights.items()}
    with torch.no_grad():
        ours = torch.func.functional_call(network, own, (), comfyui)
        theirs = tiny.denoiser(**diffusers, return_dict=False)[0]
    if theirs.ndim == 3:
        theirs = type(tiny.pipeline)._unpack_latents(theirs, 64, 64, 8)
    return ours, theirs


@pytest.mark.parametrize("tiny", ["SD1.5", "SDXL", "Flux.1"], indirect=True)
def test_both_give_the_same_without_a_lora(tiny):
    ours, theirs = denoised(tiny, {})
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# diffusers reads kohya's keys of Flux for its true width only.
@pytest.mark.parametrize(
    ("tiny", "file_format"),
    [
        *((name, file_format) for name in ("SD1.5", "SDXL") for file_format in ("automatic", "kohya", "diffusers")),
        ("Flux.1", "automatic"),
        ("Flux.1", "diffusers"),
    ],
    indirect=["tiny"],
)
def test_a_saved_file_gives_the_same_in_diffusers_as_in_comfyui(pack, loras, tiny, file_format):
    import comfy.sd

    state = _lora_for(pack, tiny)
    save = pack.nodes.adapter.save.ACLoRASave.execute
    report = report_of(pack, tiny.family)
    name = save(state, "it", precision="fp32", rank_report=report, format=file_format)[0]
    plain, _ = denoised(tiny, {})
    tiny.pipeline.load_lora_weights(loras, weight_name=name)
    try:
        model, clip = comfy.sd.load_lora_for_models(tiny.model, tiny.clip, state, 1.0, 1.0)
        ours, theirs = denoised(tiny, patched(tiny.model, model))
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)
        assert (ours - plain).abs().max() > 0.1
        assert_same_text(tiny, clip)
    finally:
        tiny.pipeline.unload_lora_weights()


def assert_same_text(tiny: Tiny, changed: Any) -> None:
    """Check that all text encoders give the same as ComfyUI's with the LoRA, and another than without."""
    import comfy.lora

    own = tiny.clip.cond_stage_model.state_dict()
    weights = {
        name: comfy.lora.calculate_weight(patches, own[name].float().clone(), name)
        for name, patches in changed.patcher.patches.items()
    }
    tokens = torch.randint(0, 49000, (1, 77))
    encoders = {"clip_l": tiny.pipeline.text_encoder, "clip_g": getattr(tiny.pipeline, "text_encoder_2", None)}
    for part, theirs in encoders.items():
        if theirs is None:
            continue
        network = getattr(tiny.clip.cond_stage_model, part).transformer.text_model
        prefix = f"{part}.transformer.text_model."
        patches = {name.removeprefix(prefix): each for name, each in weights.items() if name.startswith(prefix)}
        with torch.no_grad():
            expected = torch.func.functional_call(network, patches, (tokens,))[0]
            plain = network(tokens)[0]
            found = theirs(tokens).last_hidden_state
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        assert (expected - plain).abs().max() > 0.01


# ComfyUI's class -> diffusers' class, and settings with which it has all of its layers.
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SD3": ("SD3Transformer2DModel", {"dual_attention_layers": (0,)}),
    "Flux": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "ZImage": ("ZImageTransformer2DModel", {}),
    "AuraFlow": ("AuraFlowTransformer2DModel", {}),
    "PixArtSigma": ("PixArtTransformer2DModel", {"caption_channels": 24, "use_additional_conditions": True}),
    "Krea2": ("Krea2Transformer2DModel", {}),
}


@pytest.mark.parametrize("base_model", TRANSFORMERS)
def test_names_for_diffusers_are_those_of_its_models(pack, base_model):
    import diffusers

    kind, settings = TRANSFORMERS[base_model]
    with torch.device("meta"):
        network = getattr(diffusers, kind)(**settings)
    theirs = {_starred(name) for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    rules = pack.aclora_core.adapter.names.family_of(base_model).rules
    ours = {_starred(name.removeprefix("transformer.")) for rule in rules for name in rule.diffusers}
    assert {name for name in ours if not name.startswith("text_encoder")} == theirs


# Families whose layers have the same names in ComfyUI and in diffusers.
SAME_NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen-Image": ("QwenImageTransformer2DModel", {}),
    "HiDream": (
        "HiDreamImageTransformer2DModel",
        {"patch_size": 2, "in_channels": 16, "caption_channels": [24, 20], "llama_layers": [0, 1]},
    ),
    "Kandinsky 5": ("Kandinsky5Transformer3DModel", {}),
    "ERNIE-Image": ("ErnieImageTransformer2DModel", {}),
}


@pytest.mark.parametrize("name", SAME_NAMES)
def test_some_models_have_the_same_names_in_both(pack, name):
    import diffusers

    kind, settings = SAME_NAMES[name]
    with torch.device("meta"):
        network = getattr(diffusers, kind)(**settings)
    theirs, ours = (
        {_starred(name) for name, module in each.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
        for each in (network, build(FAMILIES[name]).model.diffusion_model)
    )
    assert ours == theirs


def _starred(name: str) -> str:
    return re.sub(r"\d+", "*", name)
