"""Training other models in the real ComfyUI: a UNet, quantised weights, float16."""

import logging
import math

import pytest
import torch

from tests.support import tiny_base as tiny
from tests.support.tiny_base import (
    DENOISER,
    answer,
    denoising_loss,
    first_step,
    noisy_pair,
    open_training,
    trained,
    untouched,
)

# Fixtures: the tiny base, two images, ComfyUI's Cancel.
parts, pictures = tiny.parts, tiny.pictures


@pytest.fixture
def unet(pack):
    """A random narrow UNet of SD1.5's architecture, of ComfyUI's classes; predicts ε."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    shape = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "num_res_blocks": [1, 1],
        "channel_mult": [1, 2],
        "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 1, 1, 1],
        "transformer_depth_middle": 1,
        "context_dim": 24,
        "num_heads": 4,
        "num_head_channels": -1,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": False,
        "legacy": False,
        "use_checkpoint": False,
        "adm_in_channels": None,
        "use_temporal_attention": False,
        "dtype": torch.float32,
    }
    with torch.inference_mode():
        base = comfy.model_base.BaseModel(comfy.supported_models.SD15(shape), comfy.model_base.ModelType.EPS, "cpu")
        generator = torch.Generator().manual_seed(0)
        for name, weight in base.diffusion_model.named_parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5)
            else:
                weight.fill_(name.endswith("weight"))  # norms
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(base, load_device=cpu, offload_device=cpu)


def unet_pictures():
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        latents = [{"samples": torch.randn(1, 4, 16, 16, generator=generator) * 3} for _ in range(2)]
        return latents, [[[torch.randn(1, 77, 24, generator=generator), {}]] for _ in range(2)]


def test_a_unet_is_trained_with_its_convolutions(pack, unet, caplog):
    latents, captions = unet_pictures()
    with untouched(unet), caplog.at_level(logging.WARNING):
        settings = {"steps": 10, "smallest": False, "learning_rate": 5e-3, "mode": "paper", "restart_every": 4}
        changed, lora_model, loss_map, report, *_ = trained(pack, unet, latents, captions, **settings)
    assert not caplog.records
    losses = loss_map["loss"]
    assert len(report.restarts) == 1 and sum(losses[-3:]) < sum(losses[:3])
    kernel = lora_model[f"{DENOISER}input_blocks.2.0.op.lora_down.weight"]
    assert kernel.shape == (4, 32, 3, 3) and len(changed.patches) == len(lora_model) // 3


def test_the_saved_adapter_equals_the_trained_one(pack, unet):
    """LoRA branches and ComfyUI's patched weights give the same output, also for strided convolutions."""
    core = pack.aclora_core
    latents, captions = unet_pictures()
    changed, lora_model, _, *_ = trained(pack, unet, latents, captions, layers="all", learning_rate=1e-2)
    layers = core.adapter.lora_file.from_state_dict(lora_model).layers
    branches = core.lora.parameters.FlatParameters(layers, torch.device("cpu")).layers
    answers = []
    for chosen, beside in ((unet, branches), (changed, {}), (unet, {})):
        with (
            torch.inference_mode(),
            open_training(pack, chosen, latents, captions) as (frozen, images),
            torch.no_grad(),
        ):
            noisy, sigma = noisy_pair(frozen, images)
            modules = core.lora.targets.preset_layers(frozen.network, "all", frozen.prefix)
            with core.lora.injection.injected(modules, beside):
                answers.append(answer(frozen, images, noisy, sigma, [0, 1]))
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-3, atol=1e-4)
    assert (answers[0] - answers[2]).abs().max() > 0.01


def test_a_unet_is_trained_with_its_own_noise_schedule(pack, unet):
    """ε-prediction: the target variance is 1, and the noise levels are those of ComfyUI's schedule."""
    core = pack.aclora_core
    with torch.inference_mode(), open_training(pack, unet, *unet_pictures()) as (frozen, images):
        assert frozen.objective.sampling == "uniform"
        variance = core.diffusion.objective.target_variance(frozen.objective, images.latents * 8, 0)
        assert variance == pytest.approx(1, abs=0.03)
        sigmas = core.diffusion.objective.draw_sigmas(frozen.objective, 500, torch.Generator().manual_seed(0))
        sampling = frozen.base.model_sampling
        assert sampling.sigma_min <= sigmas.min() < 0.1 and 10 < sigmas.max() <= sampling.sigma_max


def test_a_quantised_model_is_trained(pack, parts, pictures):
    """Eight-bit weights with a scale, as ComfyUI loads them; the adapter never reads them."""
    import json

    import comfy.sd
    from comfy.quant_ops import QuantizedTensor
    from safetensors.torch import load_file

    weights = load_file(pack.nodes.tiny_base.FOLDER / "denoiser.safetensors")
    layers = {}
    for key in [key for key in weights if key.endswith(("qkv.weight", "fc1.weight"))]:
        name, scale = key.removesuffix(".weight"), weights[key].float().abs().max() / 448
        weights[key] = (weights[key].float() / scale).to(torch.float8_e4m3fn)
        weights[f"{name}.weight_scale"] = scale
        layers[name] = {"format": "float8_e4m3fn"}
    with torch.inference_mode():
        metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
        model = comfy.sd.load_diffusion_model_state_dict(weights, metadata=metadata)
    qkv = model.model.diffusion_model.joint_blocks[0].x_block.attn.qkv
    assert isinstance(qkv.weight, QuantizedTensor)
    before = qkv.weight.dequantize().clone()
    changed, lora_model, loss_map, *_ = trained(pack, model, *pictures, steps=16, learning_rate=2e-3)
    assert lora_model[f"{DENOISER}joint_blocks.0.x_block.attn.qkv.lora_up.weight"].any()
    losses = loss_map["loss"]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4]) and denoising_loss(pack, changed, *pictures) < sum(losses[:4]) / 4
    first_step(model, pictures[1][0])  # removes the patches of the changed copy
    assert isinstance(qkv.weight, QuantizedTensor) and torch.equal(qkv.weight.dequantize(), before)
    assert not qkv._forward_hooks


def test_a_model_in_float16_is_trained(pack, parts, pictures):
    """The loss is scaled; no step is skipped."""
    import comfy.sd
    from safetensors.torch import load_file

    weights = load_file(pack.nodes.tiny_base.FOLDER / "denoiser.safetensors")
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": torch.float16})
    if model.model.get_dtype_inference() != torch.float16:
        model.model.manual_cast_dtype = torch.float16
    assert model.model.get_dtype_inference() == torch.float16
    losses = trained(pack, model, *pictures, steps=10, learning_rate=2e-3)[2]["loss"]
    assert all(map(math.isfinite, losses)) and sum(losses[-4:]) < 0.8 * sum(losses[:4])
