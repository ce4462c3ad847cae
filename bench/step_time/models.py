"""Models with random weights, built from ComfyUI's own classes, and random latents and captions."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

IMAGES = 8
GIB = 2**30
# The network settings by which ComfyUI detects these models.
UNET: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_checkpoint": False,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
SD15 = UNET | {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "context_dim": 768,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
}
SDXL = UNET | {
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "context_dim": 2048,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}
FLUX: dict[str, Any] = {
    "image_model": "flux",
    "guidance_embed": True,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "hidden_size": 3072,
    "num_heads": 24,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "mlp_ratio": 4.0,
    "qkv_bias": True,
    "txt_ids_dims": [],
    "context_in_dim": 4096,
    "vec_in_dim": 768,
    "depth": 19,
    "depth_single_blocks": 38,
}
Z_IMAGE: dict[str, Any] = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 3840,
    "cap_feat_dim": 2560,
    "n_layers": 30,
    "n_heads": 30,
    "n_kv_heads": 30,
    "qk_norm": True,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8 / 3,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
QWEN_IMAGE: dict[str, Any] = {"image_model": "qwen_image", "in_channels": 64, "num_layers": 60}
# Small enough for a CPU, with every kind of layer.
_SMALL_UNET = {
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [0, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [0, 0, 1, 1],
    "context_dim": 24,
}
_SMALL_FLUX = {
    "hidden_size": 64,
    "num_heads": 2,
    "axes_dim": [8, 12, 12],
    "context_in_dim": 24,
    "vec_in_dim": 16,
    "depth": 1,
    "depth_single_blocks": 2,
}
_SMALL_Z_IMAGE = {"dim": 256, "cap_feat_dim": 24, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2}
_SMALL_QWEN_IMAGE = {
    "num_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": [8, 12, 12],
}


@dataclass(frozen=True)
class Case:
    """A model and the shapes of its training data."""

    name: str  # on the command line
    title: str
    config: str  # class in comfy.supported_models; "" for the tiny base, which is loaded from its files
    network: dict[str, Any]
    latent: tuple[int, int, int]  # channels, height, width
    text: tuple[int, int]  # tokens, width
    pooled: int | None = None  # width of the pooled caption embedding
    video: bool = False  # whether its latents have a frame dimension
    dtype: torch.dtype = torch.bfloat16  # of the weights on a GPU


CASES = {
    case.name: case
    for case in (
        Case("sdxl", "SDXL 1024²", "SDXL", SDXL, (4, 128, 128), (77, 2048), 1280),
        Case("sd15", "SD1.5 512²", "SD15", SD15, (4, 64, 64), (77, 768)),
        Case("flux", "Flux 1024²", "Flux", FLUX, (16, 128, 128), (512, 4096), 768),
        Case("z_image", "Z-Image 1024²", "ZImage", Z_IMAGE, (16, 128, 128), (128, 2560)),
        Case("qwen_image", "Qwen-Image 1024²", "QwenImage", QWEN_IMAGE, (16, 128, 128), (128, 3584), video=True),
        Case("tiny", "tiny base 128²", "", {}, (16, 16, 16), (24, 256)),
    )
}
_SMALL_SIZES: dict[str, Any] = {
    "sdxl": {"latent": (4, 8, 8), "text": (7, 24), "pooled": 16},
    "sd15": {"latent": (4, 8, 8), "text": (7, 24)},
    "flux": {"latent": (16, 8, 8), "text": (7, 24), "pooled": 16},
    "z_image": {"latent": (16, 8, 8), "text": (7, 24)},
    "qwen_image": {"latent": (16, 8, 8), "text": (7, 24)},
    "tiny": {},
}
_SMALL_NETWORKS: dict[str, Any] = {
    "sdxl": _SMALL_UNET | {"model_channels": 64, "adm_in_channels": 16 + 6 * 256},  # six size embeddings
    "sd15": _SMALL_UNET | {"model_channels": 32},
    "flux": _SMALL_FLUX,
    "z_image": _SMALL_Z_IMAGE,
    "qwen_image": _SMALL_QWEN_IMAGE,
    "tiny": {},
}


def case_named(name: str, miniature: bool, memory: int) -> Case:
    """Return a case.

    Args:
        name: of CASES; with "_fp8" or "_fp16" behind it, the weights are kept in that type.
        miniature: whether to return a small model of the same kind.
        memory: bytes of GPU memory; Flux is truncated to the blocks that fit.
    """
    if name.endswith("_fp8"):
        return _in_fp8(case_named(name.removesuffix("_fp8"), miniature, memory))
    if name.endswith("_fp16"):
        return in_fp16(case_named(name.removesuffix("_fp16"), miniature, memory))
    case = CASES[name]
    if miniature:
        network = case.network | _SMALL_NETWORKS[name]
        return replace(case, title=f"{case.title.split()[0]} in miniature", network=network, **_SMALL_SIZES[name])
    return _truncated_flux(case, memory) if name == "flux" else case


def in_fp16(case: Case) -> Case:
    """Return a case with weights in float16, the type that ComfyUI loads files of SD1.5 and SDXL in."""
    return replace(case, title=f"{case.title}, weights in fp16", dtype=torch.float16)


def _in_fp8(case: Case) -> Case:
    """Return a case whose weights are kept in float8_e4m3fn, and computed with in bfloat16."""
    title = case.title.replace(" ", " fp8 ", 1)
    return replace(case, name=f"{case.name}_fp8", title=title, dtype=torch.float8_e4m3fn)


def _truncated_flux(case: Case, memory: int) -> Case:
    """Drop the same share of Flux's double and single blocks, until a step of the native node at batch 1 should fit.

    A double block has 0.68 GB of weights, a single one 0.28 GB, and the native node makes a patched copy of every
    weight; the activations of 4608 tokens take about 0.9 GB a block. 8 GB are for the rest.
    """
    double, single = 2 * 0.68 + 0.9, 2 * 0.28 + 0.9
    doubles, singles = case.network["depth"], case.network["depth_single_blocks"]
    share = min(1.0, (memory / GIB - 8) / (doubles * double + singles * single))
    kept = max(1, int(doubles * share)), max(1, int(singles * share))
    blocks = {"depth": kept[0], "depth_single_blocks": kept[1]}
    title = f"{case.title}, {kept[0]} of {doubles} double and {kept[1]} of {singles} single blocks"
    return replace(case, title=title, network=case.network | blocks)


def build_model(case: Case, weights: bool = True, disable_dynamic: bool = False) -> Any:
    """Return the MODEL as a loader gives it, with random weights on the device.

    Args:
        weights: False for an empty model (meta device) that only knows how ComfyUI reloads it.
        disable_dynamic: whether to use the ModelPatcher that loads all weights at once.
    """
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    if not case.config:
        from launcher.inprocess import PACK_NAME

        host = importlib.import_module(f"{PACK_NAME}.nodes.host")
        folder = importlib.import_module(f"{PACK_NAME}.nodes.tiny_base").FOLDER
        return host.load_tiny_denoiser(folder, disable_dynamic)
    device = comfy.model_management.get_torch_device()
    config = getattr(comfy.supported_models, case.config)(case.network)
    dtype = case.dtype if device.type == "cuda" or case.dtype.itemsize == 1 else torch.float32
    config.set_inference_dtype(dtype, torch.bfloat16 if dtype.itemsize == 1 else None, device=device)
    base = config.get_model({}, "", device=device if weights else torch.device("meta"))
    if weights:
        randomise(base.diffusion_model)
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    # Offloaded, it stays on the device: moving gigabytes to main memory and back is not what is measured.
    model = kind(base, load_device=device, offload_device=device)
    model.cached_patcher_init = (build_model, (case,))
    return model


@torch.no_grad()
def randomise(network: nn.Module, seed: int = 0) -> None:
    """Fill a network with random weights that keep activations near 1, none of them zero.

    Every layer gets a gradient. The values are exact in bfloat16, so a model is the same in every dtype.
    """
    parameters = list(network.named_parameters())
    generator = torch.Generator(parameters[0][1].device).manual_seed(seed)
    for name, parameter in parameters:
        # Nothing is drawn in types of one byte.
        drawn = parameter.bfloat16() if parameter.element_size() == 1 else parameter
        if parameter.ndim > 1:
            drawn.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        elif name.endswith("bias"):
            drawn.normal_(0, 0.02, generator=generator)
        else:
            drawn.fill_(1)  # weight of a norm
        parameter.copy_(drawn.bfloat16())


def random_dataset(case: Case, count: int = IMAGES, sizes: int = 1) -> tuple[list[dict[str, Tensor]], list[Any]]:
    """Return random LATENTs and CONDITIONINGs as ComfyUI's nodes pass them on, of one size or more."""
    generator = torch.Generator().manual_seed(1)
    channels, height, width = case.latent
    latents, captions = [], []
    for index in range(count):
        sides = (height, width) if index % sizes == 0 else (height // 2, width)
        size = (1, channels, 1, *sides) if case.video else (1, channels, *sides)
        latents.append({"samples": torch.randn(size, generator=generator)})
        pooled = torch.randn(1, case.pooled, generator=generator) if case.pooled else None
        captions.append([[torch.randn(1, *case.text, generator=generator), {"pooled_output": pooled}]])
    return latents, captions
