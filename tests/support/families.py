"""Small models of every family that ComfyUI knows."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.support import family_sizes as sizes
from tests.support.family_models import Family, build, caption, pictures, randomise

__all__ = ["FAMILIES", "MASK", "Family", "build", "caption", "pictures", "randomise"]


def _llama(generator: torch.Generator) -> Tensor:
    return torch.randn(1, 2, 5, 20, generator=generator)  # captions, layers, tokens, width


def _whole_mask(generator: torch.Generator) -> Tensor:
    return torch.ones(1, 7, dtype=torch.long)


def _fast_fp8() -> dict[str, Any]:
    """Return ComfyUI's options for fp8 matmul, which it uses on GPUs that support it."""
    import comfy.ops

    return {"dtype": torch.float8_e4m3fn, "custom_operations": comfy.ops.fp8_ops}


def _hidream_tokens(generator: torch.Generator) -> Tensor:
    words = torch.randint(0, 1000, (1, 6), generator=generator)
    return torch.cat([words, torch.tensor([[151673]])], 1)  # the token of the noise level


def _t5_tokens(generator: torch.Generator) -> Tensor:
    return torch.randint(0, 1000, (7,), generator=generator, dtype=torch.int)


def _t5_weights(generator: torch.Generator) -> Tensor:
    return torch.ones(7)


def _small_adapter() -> AbstractContextManager[Any]:
    """Make Anima's text adapter small: its fixed size has 130 million parameters."""
    import comfy.ldm.anima.model as anima

    sizes = {"source_dim": 24, "target_dim": 24, "model_dim": 32, "num_layers": 1, "num_heads": 2}
    return mock.patch.object(anima, "LLMAdapter", partial(anima.LLMAdapter, **sizes))


def _t5_of_hunyuan(generator: torch.Generator) -> Tensor:
    return torch.randn(1, 5, 32, generator=generator)


def _t5_mask(generator: torch.Generator) -> Tensor:
    return torch.tensor([[1, 1, 1, 1, 0]])


MASK = {"attention_mask": _whole_mask}
HUNYUAN = {**MASK, "conditioning_mt5xl": _t5_of_hunyuan, "attention_mask_mt5xl": _t5_mask}

FAMILIES = {
    "SD1.5": Family("SD15", sizes.SD15, (4, 8, 8), contrast=1.0),
    "SD2.1": Family(
        "SD20",
        sizes.UNET | {"use_linear_in_transformer": True, "model_channels": 64},
        (4, 8, 8),
        contrast=1.0,
        # ComfyUI detects v-prediction by the deviation of this tensor.
        file={"output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.linspace(-1, 1, 8)},
    ),
    "SDXL": Family("SDXL", sizes.SDXL, (4, 8, 8), pooled=16, contrast=1.0),
    "SDXL in fp16": Family("SDXL", sizes.SDXL, (4, 8, 8), pooled=16, contrast=1.0, dtype=torch.float16),
    "KOALA": Family("KOALA_700M", sizes.SDXL | {"transformer_depth_middle": -2}, (4, 8, 8), pooled=16, contrast=1.0),
    "Playground 2.5": Family(
        "SDXL",
        sizes.SDXL,
        (4, 8, 8),
        pooled=16,
        contrast=30.0,
        settings={"steps": 48, "schedule": "cosine"},
        file={"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)},  # as in Playground's checkpoint
    ),
    "Stable Cascade C": Family(
        "Stable_Cascade_C",
        sizes.CASCADE,
        (16, 8, 8),
        pooled=16,
        contrast=0.1,
        settings={"max_rank": 16, "alpha": 16.0},  # full rank in its channels, since it predicts noise
    ),
    "SD3": Family("SD3", sizes.SD3, (16, 8, 8), pooled=16),
    "SD3 in fp8": Family("SD3", sizes.SD3, (16, 8, 8), pooled=16, loading=lambda: {"dtype": torch.float8_e4m3fn}),
    "SD3 in fast fp8": Family("SD3", sizes.SD3, (16, 8, 8), pooled=16, loading=_fast_fp8),
    "SD3.5": Family("SD3", sizes.SD3 | {"x_block_self_attn_layers": [0]}, (16, 8, 8), pooled=16),
    "PixArt Alpha": Family("PixArtAlpha", sizes.PIXART, (4, 40, 40), contrast=1.0),
    "PixArt Sigma": Family("PixArtSigma", sizes.PIXART_SIGMA, (4, 40, 40), contrast=1.0),
    "AuraFlow": Family("AuraFlow", sizes.AURAFLOW, (4, 8, 8), contrast=12.0),
    "HunyuanDiT": Family("HunyuanDiT", sizes.HUNYUAN_DIT, (4, 8, 8), contrast=8.0, extras=HUNYUAN),
    "HunyuanDiT 1.0": Family(
        "HunyuanDiT1",
        sizes.HUNYUAN_DIT | {"image_model": "hydit1", "size_cond": True, "use_style_cond": True},
        (4, 8, 8),
        contrast=8.0,
        extras=HUNYUAN,
    ),
    "Flux.1": Family("Flux", sizes.FLUX_1, (16, 8, 8), pooled=16),
    "Flux.1 schnell": Family("FluxSchnell", sizes.FLUX_1 | {"guidance_embed": False}, (16, 8, 8), pooled=16),
    # ComfyUI pads it with zeros to 512 tokens.
    "Flux.2": Family("Flux2", sizes.FLUX_2, (128, 4, 4), text=(256, 24)),
    "LongCat": Family("LongCatImage", sizes.LONGCAT, (16, 8, 8)),
    "Ovis": Family("FluxSchnell", sizes.LONGCAT | {"yak_mlp": True, "txt_norm": True}, (16, 8, 8)),
    "Chroma": Family("Chroma", sizes.CHROMA, (16, 8, 8)),
    "Chroma Radiance": Family("ChromaRadiance", sizes.RADIANCE, (3, 32, 32)),
    "Lumina 2": Family("Lumina2", sizes.LUMINA | {"n_kv_heads": 1}, (16, 8, 8), extras=MASK),
    "NewBie": Family(
        "Lumina2", sizes.LUMINA | {"n_kv_heads": 1, "clip_text_dim": 16}, (16, 8, 8), pooled=16, extras=MASK
    ),
    "Z-Image": Family("ZImage", sizes.Z_IMAGE, (16, 8, 8), extras=MASK),
    "Z-Image pixel": Family("ZImagePixelSpace", sizes.Z_IMAGE_PIXEL, (3, 16, 16), extras=MASK),
    "Qwen-Image": Family("QwenImage", sizes.QWEN, (16, 1, 8, 8)),
    "Mage-Flow": Family("MageFlow", sizes.MAGE, (128, 4, 4)),
    "HiDream": Family("HiDream", sizes.HIDREAM, (16, 8, 8), pooled=16, extras={"conditioning_llama3": _llama}),
    "HiDream-O1": Family(
        "HiDreamO1", sizes.HIDREAM_O1, (3, 64, 64), text=(7, 1), extras={"text_input_ids": _hidream_tokens}
    ),
    "Hunyuan Image 2.1": Family("HunyuanImage21", sizes.HUNYUAN_IMAGE | {"byt5": True}, (64, 4, 4)),
    "Kandinsky 5 Image": Family("Kandinsky5Image", sizes.KANDINSKY, (16, 8, 8), pooled=16),
    "ERNIE-Image": Family("ErnieImage", sizes.ERNIE, (128, 4, 4)),
    "OmniGen 2": Family("Omnigen2", sizes.OMNIGEN, (16, 8, 8), extras=MASK),
    "Boogu": Family("Boogu", sizes.BOOGU, (16, 8, 8), extras=MASK),
    "JoyImage": Family("JoyImage", sizes.JOY, (16, 1, 8, 8)),
    "Ideogram 4": Family("Ideogram4", sizes.IDEOGRAM, (128, 4, 4), extras=MASK),
    "Krea 2": Family("Krea2", sizes.KREA, (16, 1, 8, 8)),
    "Lens": Family("Lens", sizes.LENS, (128, 4, 4)),
    "Cosmos Predict 2": Family("CosmosT2IPredict2", sizes.COSMOS | {"image_model": "cosmos_predict2"}, (16, 1, 8, 8)),
    "Anima": Family(
        "Anima",
        sizes.COSMOS | {"image_model": "anima"},
        (16, 1, 8, 8),
        extras={"t5xxl_ids": _t5_tokens, "t5xxl_weights": _t5_weights},
        building=_small_adapter,
    ),
    "Cosmos 1": Family("CosmosT2V", sizes.COSMOS_1, (16, 1, 8, 8)),
    "Wan 2.1": Family("WAN21_T2V", sizes.WAN | {"in_dim": 16, "out_dim": 16}, (16, 1, 8, 8)),
    "Wan 2.2 5B": Family("WAN22_T2V", sizes.WAN | {"in_dim": 48, "out_dim": 48}, (48, 1, 8, 8)),
    "Hunyuan Video": Family("HunyuanVideo", sizes.HUNYUAN_VIDEO, (16, 1, 8, 8), pooled=16),
    "Hunyuan Video 1.5": Family("HunyuanVideo15", sizes.HUNYUAN_VIDEO_15, (32, 1, 4, 4)),
    "Kandinsky 5": Family("Kandinsky5", sizes.KANDINSKY | {"visual_embed_dim": 132}, (16, 1, 8, 8), pooled=16),
    "Mochi": Family("GenmoMochi", sizes.MOCHI, (12, 1, 8, 8), extras=MASK),
    "CogVideoX": Family("CogVideoX_T2V", sizes.COGVIDEO, (16, 1, 8, 8), contrast=2.0),
    "SDXL inpainting": Family("SDXL", sizes.SDXL | {"in_channels": 9}, (4, 8, 8), pooled=16, contrast=1.0),
    "SDXL InstructPix2Pix": Family(
        "SDXL_instructpix2pix", sizes.SDXL | {"in_channels": 8}, (4, 8, 8), pooled=16, contrast=1.0
    ),
    "Flux.1 Fill": Family("FluxInpaint", sizes.FLUX_1 | {"in_channels": 96}, (16, 8, 8), pooled=16),
}
