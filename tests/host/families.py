"""Small models of every family that the host knows, built by its own classes as a loader would, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

CPU = torch.device("cpu")
# What the layers are called that give the answer.
OUTPUTS = ("out.2.weight", "final_layer.linear.weight", "proj_out.weight", "head.head.weight")
UNET: dict[str, Any] = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1],
    "channel_mult": [1], "transformer_depth": [1], "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1], "context_dim": 24, "use_spatial_transformer": True, "legacy": False,
    "use_checkpoint": False, "use_temporal_attention": False, "use_temporal_resblock": False, "adm_in_channels": None,
}  # fmt: skip
SDXL: dict[str, Any] = UNET | {
    "model_channels": 64, "use_linear_in_transformer": True, "num_classes": "sequential",
    "adm_in_channels": 16 + 6 * 256,  # the pooled caption, and six sizes of the picture
}  # fmt: skip
SD3: dict[str, Any] = {
    "in_channels": 16, "patch_size": 2, "depth": 1, "input_size": None, "adm_in_channels": 16,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 24, "out_features": 64}},
    "pos_embed_max_size": 16, "pos_embed_scaling_factor": None, "num_patches": 256, "qk_norm": "rms",
    "x_block_self_attn_layers": [],
}  # fmt: skip
FLUX: dict[str, Any] = {
    "hidden_size": 64, "num_heads": 2, "axes_dim": [8, 12, 12], "context_in_dim": 24, "depth": 1,
    "depth_single_blocks": 1, "theta": 10000, "mlp_ratio": 4.0, "qkv_bias": True, "txt_ids_dims": [],
}  # fmt: skip
LUMINA: dict[str, Any] = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 64, "cap_feat_dim": 24, "n_layers": 1,
    "n_refiner_layers": 1, "qk_norm": True, "n_heads": 2, "axes_dims": [8, 12, 12], "axes_lens": [300, 512, 512],
    "multiple_of": 32, "ffn_dim_multiplier": 1.0,
}  # fmt: skip
COSMOS: dict[str, Any] = {
    "max_img_h": 64, "max_img_w": 64, "max_frames": 8, "in_channels": 16, "out_channels": 16, "patch_spatial": 2,
    "patch_temporal": 1, "model_channels": 64, "concat_padding_mask": True, "crossattn_emb_channels": 24,
    "pos_emb_cls": "rope3d", "pos_emb_learnable": True, "pos_emb_interpolation": "crop", "min_fps": 1, "max_fps": 30,
    "use_adaln_lora": True, "adaln_lora_dim": 8, "num_blocks": 1, "num_heads": 2, "extra_per_block_abs_pos_emb": False,
    "rope_h_extrapolation_ratio": 4.0, "rope_w_extrapolation_ratio": 4.0, "rope_t_extrapolation_ratio": 1.0,
    "extra_h_extrapolation_ratio": 1.0, "extra_w_extrapolation_ratio": 1.0, "extra_t_extrapolation_ratio": 1.0,
    "rope_enable_fps_modulation": False,
}  # fmt: skip
WAN: dict[str, Any] = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 64, "num_heads": 2, "ffn_dim": 128, "num_layers": 1,
    "patch_size": (1, 2, 2), "freq_dim": 64, "text_dim": 24, "window_size": (-1, -1), "qk_norm": True,
    "cross_attn_norm": True, "eps": 1e-6,
}  # fmt: skip
HIDREAM: dict[str, Any] = {
    "image_model": "hidream", "attention_head_dim": 32, "axes_dims_rope": [16, 8, 8], "caption_channels": [24, 20],
    "max_resolution": [16, 16], "in_channels": 16, "llama_layers": [0, 1], "num_attention_heads": 2,
    "num_routed_experts": 4, "num_activated_experts": 2, "num_layers": 1, "num_single_layers": 1, "out_channels": 16,
    "patch_size": 2, "text_emb_dim": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A model and the sizes of what it learns from."""

    config: str  # its class in comfy.supported_models
    network: dict[str, Any]
    latent: tuple[int, ...]  # channels, [frames,] height, width
    text: tuple[int, int] = (7, 24)  # tokens, width
    pooled: int | None = None  # width of the pooled caption
    contrast: float = 4.0  # of the two pictures; those that predict the noise alone learn nothing by more
    extras: dict[str, Callable[[torch.Generator], Any]] = field(default_factory=dict)  # beside the caption
    file: dict[str, Tensor] = field(default_factory=dict)  # what the host looks at in a file, besides shapes
    loading: Callable[[], dict[str, Any]] | None = None  # options for the host's loader, which then loads the weights
    dtype: torch.dtype = torch.float32  # of the weights, and of what the network computes in


def _llama(generator: torch.Generator) -> Tensor:
    return torch.randn(1, 2, 5, 20, generator=generator)  # captions, layers, tokens, width


def _whole_mask(generator: torch.Generator) -> Tensor:
    return torch.ones(1, 7)


def _fast_fp8() -> dict[str, Any]:
    """The layers that multiply in fp8, which the host takes on a GPU that can."""
    import comfy.ops

    return {"dtype": torch.float8_e4m3fn, "custom_operations": comfy.ops.fp8_ops}


FAMILIES = {
    "SD1.5": Family("SD15", UNET | {"use_linear_in_transformer": False}, (4, 8, 8), contrast=1.0),
    "SD2.1": Family(
        "SD20", UNET | {"use_linear_in_transformer": True, "model_channels": 64}, (4, 8, 8), contrast=1.0,
        # By this the host tells those that predict v from those that predict noise.
        file={"output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.linspace(-1, 1, 8)},
    ),
    "SDXL": Family("SDXL", SDXL, (4, 8, 8), pooled=16, contrast=1.0),
    "SDXL in fp16": Family("SDXL", SDXL, (4, 8, 8), pooled=16, contrast=1.0, dtype=torch.float16),
    "SD3": Family("SD3", SD3, (16, 8, 8), pooled=16),
    "SD3 in fp8": Family("SD3", SD3, (16, 8, 8), pooled=16, loading=lambda: {"dtype": torch.float8_e4m3fn}),
    "SD3 in fast fp8": Family("SD3", SD3, (16, 8, 8), pooled=16, loading=_fast_fp8),
    "Flux.1": Family(
        "Flux",
        FLUX | {
            "image_model": "flux", "guidance_embed": True, "in_channels": 16, "out_channels": 16, "patch_size": 2,
            "vec_in_dim": 16,
        },
        (16, 8, 8), pooled=16,
    ),
    "Flux.2": Family(
        "Flux2",
        FLUX | {
            "image_model": "flux2", "guidance_embed": True, "in_channels": 128, "out_channels": 128, "patch_size": 1,
            "vec_in_dim": None, "axes_dim": [8, 8, 8, 8], "mlp_ratio": 3.0, "theta": 2000, "global_modulation": True,
            "mlp_silu_act": True, "qkv_bias": False, "ops_bias": False, "default_ref_method": "index",
            "ref_index_scale": 10.0, "txt_ids_dims": [3],
        },
        (128, 4, 4), text=(256, 24),  # the host adds zeros up to 512 tokens
    ),
    "Chroma": Family(
        "Chroma",
        FLUX | {
            "image_model": "chroma", "in_channels": 64, "out_channels": 64, "patch_size": 2, "vec_in_dim": 16,
            "in_dim": 64, "out_dim": 64, "hidden_dim": 32, "n_layers": 1,
        },
        (16, 8, 8),
    ),
    "Lumina 2": Family("Lumina2", LUMINA | {"n_kv_heads": 1}, (16, 8, 8), extras={"attention_mask": _whole_mask}),
    "Z-Image": Family(
        "ZImage",
        LUMINA | {
            "dim": 256, "n_heads": 8, "n_kv_heads": 8, "rope_theta": 256.0, "z_image_modulation": True,
            "time_scale": 1000.0, "pad_tokens_multiple": 32,
        },
        (16, 8, 8), extras={"attention_mask": _whole_mask},
    ),
    "Qwen-Image": Family(
        "QwenImage",
        {
            "image_model": "qwen_image", "in_channels": 64, "num_layers": 1, "attention_head_dim": 32,
            "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": (8, 12, 12),
        },
        (16, 1, 8, 8),
    ),
    "Wan 2.1": Family("WAN21_T2V", WAN | {"in_dim": 16, "out_dim": 16}, (16, 1, 8, 8)),
    "Wan 2.2 5B": Family("WAN22_T2V", WAN | {"in_dim": 48, "out_dim": 48}, (48, 1, 8, 8)),
    "HiDream": Family("HiDream", HIDREAM, (16, 8, 8), pooled=16, extras={"conditioning_llama3": _llama}),
    "Cosmos Predict 2": Family("CosmosT2IPredict2", COSMOS | {"image_model": "cosmos_predict2"}, (16, 1, 8, 8)),
}  # fmt: skip


def build(family: Family, disable_dynamic: bool = False) -> Any:
    """The MODEL as a loader gives it, made in the mode in which the host runs its nodes."""
    import comfy.model_patcher
    import comfy.sd
    import comfy.supported_models

    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    with torch.inference_mode():
        config = getattr(comfy.supported_models, family.config)(family.network)
        config.set_inference_dtype(family.dtype, None, device=CPU)
        base = config.get_model(dict(family.file), "")
        fill(base.diffusion_model)
        if family.loading is None:
            model = kind(base, load_device=CPU, offload_device=CPU)
        else:
            weights, options = base.diffusion_model.state_dict(), family.loading()
            model = comfy.sd.load_diffusion_model_state_dict(weights, options, disable_dynamic=disable_dynamic)
    model.cached_patcher_init = (build, (family,))
    return model


@torch.no_grad()
def fill(network: nn.Module, seed: int = 0) -> None:
    """Random weights; those of the last layer are small, so that little is foretold at first."""
    randomise(network, seed)
    weights = network.state_dict()
    (last,) = (weights[name] for name in OUTPUTS if name in weights)
    last.mul_(0.1)


@torch.no_grad()
def randomise(network: nn.Module, seed: int = 0) -> None:
    """Random weights that keep activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in network.state_dict().items():
        if not weight.is_floating_point():
            continue
        if weight.ndim > 1:
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight[0].numel() ** -0.5)
        elif name.endswith("bias"):
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
        else:
            weight.fill_(1)  # of a norm


def pictures(family: Family) -> tuple[list[dict[str, Tensor]], list[Any]]:
    """Two latents, each of one colour, and their captions, as the host's nodes hand them on."""
    generator = torch.Generator().manual_seed(1)
    channels, *sides = family.latent
    latents, captions = [], []
    with torch.inference_mode():
        for _ in range(2):
            colour = family.contrast * torch.randn(1, channels, *(1 for _ in sides), generator=generator)
            latents.append({"samples": colour.repeat(1, 1, *sides)})
            captions.append(caption(family, generator))
    return latents, captions


def caption(family: Family, generator: torch.Generator, tokens: int | None = None) -> Any:
    """A random conditioning, of so many tokens where that is not the family's own number."""
    size = (tokens or family.text[0], family.text[1])
    pooled = torch.randn(1, family.pooled, generator=generator) if family.pooled else None
    extras = {name: make(generator) for name, make in family.extras.items()}
    return [[torch.randn(1, *size, generator=generator), {"pooled_output": pooled, **extras}]]
