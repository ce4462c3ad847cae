"""Training a small random model of every family that ComfyUI knows.

The loss falls, the adapter loads with ComfyUI's own loader, captions are not mixed, and the MODEL is unchanged.
"""

import importlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from tests.support.families import FAMILIES, Family, build, pictures
from tests.support.train_node import train

LEARNING = {
    "steps": 24,
    "batch_size": 2,
    "max_rank": 8,
    "alpha": 8.0,
    "learning_rate": 1e-2,
    "layers": "all",
    "mode": "off",
}
PREFIX = "diffusion_model."


@dataclass
class Learned:
    """A family's model and images, and the outputs of a training on them."""

    name: str
    family: Family
    model: Any
    latents: list[dict]
    captions: list[Any]
    before: dict[str, Any]  # the state of the model
    changed: Any
    lora_model: dict[str, torch.Tensor]


def trained(pack, model, latents, captions, **settings):
    """Run the training node and return its outputs."""
    return train(pack, model, latents, captions, LEARNING | settings)


@pytest.fixture(scope="module", params=FAMILIES)
def learned(request, pack) -> Iterator[Learned]:
    family = FAMILIES[request.param]
    model, (latents, captions) = build(family), pictures(family)
    before = state_of(model)
    changed, lora_model, *_ = trained(pack, model, latents, captions, **family.settings)
    yield Learned(request.param, family, model, latents, captions, before, changed, lora_model)


def state_of(model: Any) -> dict[str, Any]:
    """Return the state of a MODEL and of ComfyUI that a training must not change."""
    import comfy.ldm.flux.math
    import comfy.model_management
    import comfy.ops
    import comfy.quant_ops

    comfy.model_management.load_models_gpu([model], force_full_load=True)  # puts this MODEL's own patches on
    modules = dict(model.model.named_modules())
    hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return {
        "weights": {name: bits(weight).clone() for name, weight in model.model.state_dict().items()},
        "parameters": {name: (p.requires_grad, p.grad is None, p.dtype) for name, p in model.model.named_parameters()},
        "hooks": {name: [len(getattr(module, kind)) for kind in hooks] for name, module in modules.items()},
        "forwards": [name for name, module in modules.items() if "forward" in vars(module)],
        "graphs": [name for name, module in modules.items() if any(map(has_graph, vars(module).values()))],
        "patches": dict(model.patches),
        "options": repr(model.model_options),
        "host": (
            comfy.model_management.in_training,
            comfy.quant_ops.ck.rms_rope_split_half,
            comfy.ops.fp8_linear,
            comfy.ldm.flux.math._apply_rope1,
        ),
    }


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """View dtypes that torch cannot compare as bytes."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def has_graph(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.grad_fn is not None


def denoising_loss(pack, model, latents, captions) -> float:
    """Return the loss at fixed noise and noise levels, with the model's patches applied."""
    with torch.inference_mode(), pack.nodes.host.training_session(model, latents, captions) as (frozen, images):
        fixed_noise = importlib.import_module(f"{pack.__name__}.aclora_core.training.fixed_noise")
        return fixed_noise.mean_denoising_loss(frozen, images, range(len(latents)), 5)


def first_step(model, family: Family, conditioning) -> torch.Tensor:
    """Return the denoised latent of pure noise: one step of ComfyUI's KSampler without guidance."""
    import nodes

    with torch.inference_mode():
        empty = {"samples": torch.zeros(1, *family.latent)}
        drawn = nodes.common_ksampler(model, 3, 1, 1.0, "euler", "simple", conditioning, conditioning, empty)
    return drawn[0]["samples"]


def test_training_halves_the_loss_of_two_images(pack, learned):
    before, after = (
        denoising_loss(pack, m, learned.latents, learned.captions) for m in (learned.model, learned.changed)
    )
    assert after < 0.5 * before


def test_the_adapter_loads_with_the_stock_loader_and_changes_the_image(learned, tmp_path, monkeypatch, caplog):
    import folder_paths
    from safetensors.torch import save_file

    import nodes

    save_file(learned.lora_model, tmp_path / "mine.safetensors")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    folder_paths.filename_list_cache.pop("loras", None)
    with caplog.at_level(logging.WARNING), torch.inference_mode():
        (loaded,) = nodes.LoraLoaderModelOnly().load_lora_model_only(learned.model, "mine.safetensors", 1.0)
    assert not caplog.records and len(loaded.patches) == len(learned.lora_model) // 3
    caption = learned.captions[0]
    plain, ours, stock = (first_step(m, learned.family, caption) for m in (learned.model, learned.changed, loaded))
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-5)
    assert torch.isfinite(ours).all() and (ours - plain).abs().mean() > 0.1


def test_the_model_is_unchanged(learned):
    after = state_of(learned.model)
    assert not learned.before["graphs"] and not learned.before["forwards"]
    for name, weight in learned.before["weights"].items():
        assert torch.equal(weight, after["weights"][name]), name
    for kind in learned.before.keys() - {"weights"}:
        assert learned.before[kind] == after[kind], kind


def test_every_image_keeps_its_caption_in_a_batch(pack, learned):
    session = pack.nodes.host.training_session(learned.model, learned.latents, learned.captions)
    with session as (frozen, images), torch.no_grad():
        assert images.batch_keys[0] == images.batch_keys[1]
        sigma = torch.tensor([frozen.objective.sigma_at(0.4), frozen.objective.sigma_at(0.9)])
        noise = torch.randn(2, *learned.family.latent, generator=torch.Generator().manual_seed(0))
        noisy = frozen.objective.add_noise(sigma, noise, torch.cat(images.latents))

        def answer(rows, numbers):
            return frozen.denoise(noisy[rows], sigma[rows], images.conditioning(numbers))

        together, alone = answer([0, 1], [0, 1]), torch.cat([answer([0], [0]), answer([1], [1])])
        swapped = answer([0, 1], [1, 0])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    least = 1e-3 if learned.name == "CogVideoX" else 2e-3  # its caption tokens are few among the image tokens
    assert (together - swapped).flatten(1).abs().amax(1).min() > least


# Families whose blocks write in place, skip experts, or use kernels without a backward pass.
@pytest.mark.parametrize("name", ["Flux.1", "HiDream", "Cosmos Predict 2"])
def test_gradient_checkpointing_gives_the_same_adapter(pack, name):
    family = FAMILIES[name]
    once, twice = (
        trained(pack, build(family), *pictures(family), steps=2, checkpointing=checkpointing)
        for checkpointing in ("off", "all")
    )
    assert once[2] == twice[2] and once[1].keys() == twice[1].keys()
    for key, tensor in once[1].items():
        torch.testing.assert_close(tensor, twice[1][key], rtol=1e-4, atol=1e-5, msg=key)


# The dtypes that ComfyUI would choose on a GPU that supports both.
SUITED = {"SD1.5": torch.float16, "SDXL": torch.float16, "Flux.1": torch.bfloat16}


@pytest.mark.parametrize("name, wanted", SUITED.items(), ids=SUITED)
def test_float16_weights_are_trained_in_a_dtype_that_suits_the_network(pack, monkeypatch, name, wanted):
    import comfy.model_management

    family = replace(FAMILIES[name], dtype=torch.float16)
    monkeypatch.setattr(comfy.model_management, "should_use_bf16", lambda *_, **__: True)
    model, data = build(family), pictures(family)
    for _ in range(3):  # after a training its dtype is still in force, until ComfyUI loads the model for something else
        with pack.nodes.host.training_session(model, *data) as (frozen, images):
            layers = pack.aclora_core.lora.targets.preset_layers(frozen.network, "all").values()
            assert frozen.dtype == wanted and {layer.weight.dtype for layer in layers} == {torch.float16}
            assert all(frozen.is_unpatched(layer) for layer in layers)  # which may convert their weights


def test_a_dtype_that_a_node_has_set_is_kept(pack, monkeypatch):
    import comfy.model_management

    family = replace(FAMILIES["Flux.1"], dtype=torch.float16)
    monkeypatch.setattr(comfy.model_management, "should_use_bf16", lambda *_, **__: True)
    model, data = build(family), pictures(family)
    exact = model.clone()
    exact.set_model_compute_dtype(torch.float32)
    for each, wanted in ((exact, torch.float32), (model, torch.bfloat16)) * 2:  # both share a network
        with pack.nodes.host.training_session(each, *data) as (frozen, images):
            assert frozen.dtype == wanted


def foreign(model, monkeypatch, dynamic):
    """Make a MODEL that cannot be reloaded. dynamic: as on a GPU, where ComfyUI streams weights."""
    model.cached_patcher_init = None
    if dynamic:  # ComfyUI has no such patcher on the CPU; before loading only this method identifies it
        monkeypatch.setattr(model, "is_dynamic", lambda: True)
    return model


@pytest.mark.parametrize("name", ["SD2.1", "SD3 in fp8"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_model_without_a_reload_function_is_trained(pack, monkeypatch, name, dynamic):
    family = FAMILIES[name]
    model, (latents, captions) = foreign(build(family), monkeypatch, dynamic), pictures(family)
    before = {key: bits(weight).clone() for key, weight in model.model.state_dict().items()}
    with pack.nodes.host.training_session(model, latents, captions) as (frozen, images):
        assert (frozen.base is not model.model) == dynamic
        assert frozen.base.model_type == model.model.model_type and frozen.dtype == torch.float32
    _, lora_model, loss_map, *_ = trained(pack, model, latents, captions, steps=4)
    monkeypatch.undo()
    expected = trained(pack, build(family), latents, captions, steps=4)
    assert loss_map == expected[2] and all(torch.equal(tensor, expected[1][key]) for key, tensor in lora_model.items())
    for key, weight in model.model.state_dict().items():
        assert torch.equal(bits(weight), before[key]), key


def test_a_model_that_cannot_be_rebuilt_is_refused_with_a_message(pack, monkeypatch):
    def fail(weights, prefix):
        raise KeyError("cc_projection.weight")

    family = FAMILIES["SD1.5"]
    model, (latents, captions) = foreign(build(family), monkeypatch, True), pictures(family)
    monkeypatch.setattr(model.model.model_config, "get_model", fail)
    with pytest.raises(ValueError, match="leaves no way to load it a second time.*ComfyUI's own nodes"):
        trained(pack, model, latents, captions)


def test_fp8_matmul_without_backward_is_not_tried(pack, caplog):
    family = FAMILIES["SD3 in fast fp8"]
    with caplog.at_level(logging.INFO):
        trained(pack, build(family), *pictures(family), steps=2)
    assert "fp8 op" not in caplog.text


def test_tensors_that_a_network_caches_hold_no_autograd_graph(pack):
    family = FAMILIES["Cosmos Predict 2"]  # caches its time embedding, which is trained here
    family = replace(family, network=family.network | {"use_adaln_lora": False})
    model = build(family)
    trained(pack, model, *pictures(family), steps=1)
    kept = model.model.diffusion_model.affline_emb
    assert isinstance(kept, torch.Tensor) and not has_graph(kept) and not kept.requires_grad
