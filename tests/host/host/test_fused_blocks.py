"""ComfyUI's residual and transformer blocks with fused modules: equal results, and everything is restored."""

import importlib
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from bench.step_time import models
from tests.support import families
from tests.support.kernel_stand_ins import reference_kernels

# Families with different implementations of rotary embeddings.
ROTATING = ["Flux.2", "Chroma", "Lumina 2", "Z-Image", "Qwen-Image", "Wan 2.1", "HiDream", "Cosmos Predict 2"]

# Networks that modulate in functions of their own: how often they scale or gate, and do so with a sum.
MODULATING = {
    "SD3": (0, 4),
    "SD3.5": (0, 5),
    "AuraFlow": (0, 7),
    "Flux.2": (5, 6),
    "Chroma": (5, 5),
    "Hunyuan Image 2.1": (5, 6),
    "Lumina 2": (9, 0),
    "Z-Image": (9, 0),
    "Qwen-Image": (0, 6),
    "Kandinsky 5 Image": (0, 10),
}


def both_ways(pack, monkeypatch, make, given):
    """Return outputs and gradients of a small model without and with fused modules, the call counts and the modules.

    make: returns the MODEL. given: its latents and captions.
    """
    core = f"{pack.__name__}.aclora_core"
    lora = importlib.import_module(f"{core}.lora")
    kernels = importlib.import_module(f"{core}.acceleration.kernels")
    fast = importlib.import_module(f"{core}.acceleration.fused_modules")
    out_of_place = importlib.import_module(f"{core}.acceleration.inplace")
    with torch.inference_mode():
        opened = pack.nodes.host.training_session(make(), *given)
        with opened as (frozen, images), torch.inference_mode(False), torch.enable_grad():
            network, found, counted = frozen.network, [], Counter()
            ours = reference_kernels(kernels.Kernels, counted)
            monkeypatch.setattr(fast, "_kernels_for", lambda network, dtype: lambda group: ours)
            layers = lora.targets.preset_layers(network, "all")
            for quick in (False, True):
                kernels_found = ours if quick else None
                for user in (pack.nodes.host.differentiable_ops, pack.nodes.host.fused_modulation):
                    monkeypatch.setattr(user, "find_kernels", lambda *_, found=kernels_found: found)
                weights = lora.make_parameters(
                    layers, lora.LoraSpec(4, 4.0), torch.Generator().manual_seed(0), torch.device("cpu")
                )
                weights.master.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
                weights.refresh()
                classes = frozen.fusable if quick else fast.FusableModules()
                is_unpatched = frozen.is_unpatched if quick else (lambda module: False)
                generator = torch.Generator().manual_seed(2)
                noisy = torch.randn(images.latents[0].shape, generator=generator)
                with (
                    out_of_place.NoInplaceAdd(),  # for Flux
                    fast.fuse_modules(network, is_unpatched, classes),
                    lora.injected(layers, weights.layers, frozen.is_unpatched),
                ):
                    counted.clear()
                    output = frozen.denoise(noisy, torch.tensor([3.0]), images.conditioning([0]))
                    output.square().sum().backward()
                found.append((output.detach().clone(), weights.gradient.clone()))
            blocks = Counter(type(module).__name__ for module in network.modules())
            assert not [name for name, module in network.named_modules() if "forward" in vars(module)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)
    return counted, blocks


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_blocks_of_a_unet_give_the_same_when_fused(name, pack, monkeypatch):
    case = models.case_named(name, True, 0)
    counted, blocks = both_ways(pack, monkeypatch, lambda: models.build_model(case), models.random_dataset(case))
    transformers = blocks["BasicTransformerBlock"]
    assert counted["group_norm silu shift"] == blocks["ResBlock"] > 0
    assert counted["residual_norm"] == counted["geglu"] == transformers > 0
    assert counted["residual_norm residual"] == 2 * transformers and not counted["layer_norm"]


@pytest.mark.parametrize("name", ["Flux.1", "Flux.2", "Chroma", "Hunyuan Image 2.1", "Qwen-Image"])
def test_heads_are_joined_and_split_in_the_order_of_memory(name, pack, monkeypatch):
    order = importlib.import_module(f"{pack.__name__}.aclora_core.acceleration.head_order")
    counted = Counter()
    for kind in (order._Join, order._Split):

        def apply(*tensors, kind=kind):
            counted[kind.__name__] += 1
            return kind.apply(*tensors)

        monkeypatch.setattr(order, kind.__name__, SimpleNamespace(apply=apply))
    family = families.FAMILIES[name]
    _, blocks = both_ways(pack, monkeypatch, lambda: families.build(family), families.pictures(family))
    doubles = blocks["DoubleStreamBlock"] + blocks["QwenImageTransformerBlock"]
    assert counted["_Join"] == 3 * doubles > 0
    assert counted["_Split"] == 2 * blocks["DoubleStreamBlock"] + blocks["SingleStreamBlock"]


def test_flux_gives_the_same_when_fused(pack, monkeypatch):
    import comfy.ldm.flux.layers
    import comfy.ldm.flux.math

    own = comfy.ldm.flux.math._apply_rope1, comfy.ldm.flux.layers.apply_mod
    case = models.case_named("flux", True, 0)
    counted, blocks = both_ways(pack, monkeypatch, lambda: models.build_model(case), models.random_dataset(case))
    attentions = blocks["DoubleStreamBlock"] + blocks["SingleStreamBlock"]
    assert counted["rope"] == 2 * attentions and counted["gelu tanh"] == blocks["SingleStreamBlock"] > 0
    assert counted["rms_norm"] == blocks["RMSNorm"] > 0
    doubles, singles = 4 * blocks["DoubleStreamBlock"], blocks["SingleStreamBlock"]
    assert counted["modulate"] == doubles + singles  # gates
    assert counted["modulate addend"] == doubles + singles + blocks["LastLayer"]
    assert (comfy.ldm.flux.math._apply_rope1, comfy.ldm.flux.layers.apply_mod) == own


@pytest.mark.parametrize("name", ROTATING)
def test_other_transformers_give_the_same_when_fused(name, pack, monkeypatch):
    family = families.FAMILIES[name]
    counted, _ = both_ways(pack, monkeypatch, lambda: families.build(family), families.pictures(family))
    assert counted["rms_norm"] > 0
    assert counted["rope"] > 0 or name.startswith("Cosmos")  # which uses ComfyUI's own fused kernels


@pytest.mark.parametrize("name", list(MODULATING))
def test_modulation_gives_the_same_when_fused(name, pack, monkeypatch):
    family = families.FAMILIES[name]
    counted, _ = both_ways(pack, monkeypatch, lambda: families.build(family), families.pictures(family))
    assert (counted["modulate"], counted["modulate addend"]) == MODULATING[name]


def test_parts_of_an_image_with_modulations_of_their_own_are_left_to_comfyui(pack, monkeypatch):
    import comfy.ldm.flux.layers
    import comfy.ldm.lumina.model

    counted = Counter()
    kernels = importlib.import_module(f"{pack.__name__}.aclora_core.acceleration.kernels")
    ours = reference_kernels(kernels.Kernels, counted)
    monkeypatch.setattr(pack.nodes.host.fused_modulation, "find_kernels", lambda *_: ours)
    x, factor = torch.randn(1, 6, 8), torch.randn(2, 1, 8)
    right = torch.cat([x[:, :2] * factor[0], x[:, 2:] * factor[1]], 1)
    with pack.nodes.host.differentiable_ops.differentiable_operations():
        flux = comfy.ldm.flux.layers.apply_mod(x.clone(), factor.transpose(0, 1), None, [(0, 2, 0), (2, 6, 1)])
        lumina = comfy.ldm.lumina.model.apply_gate(factor, x.clone(), [(2, 6)])
        torch.testing.assert_close((flux, lumina), (right, right))
        assert not counted
        comfy.ldm.lumina.model.apply_gate(factor[:1], x)
        assert counted["modulate"] == 1
