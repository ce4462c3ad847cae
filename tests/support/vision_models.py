"""Small CLIP_VISIONs and CLIPs of random weights, built from ComfyUI's classes as its loaders do."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tests.support.family_models import randomise

WIDTH = 24  # of the embeddings that the small CLIP's images and texts share
_COMMON = {"num_channels": 3, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8}
_CLIP = {"intermediate_size": 64, "image_size": 32, "hidden_act": "quick_gelu"}
VISION = {
    "clip": _COMMON | _CLIP | {"model_type": "clip_vision_model", "projection_dim": WIDTH},
    "siglip": _COMMON | _CLIP | {"model_type": "siglip_vision_model"},
    "siglip2": _COMMON | _CLIP | {"model_type": "siglip2_vision_model", "image_size": -1, "num_patches": 16},
    "dinov2": _COMMON
    | {"model_type": "dinov2", "image_size": 32, "layer_norm_eps": 1e-6, "mlp_ratio": 4, "use_swiglu_ffn": False},
    "dinov3": _COMMON
    | {"model_type": "dinov3", "image_size": 32, "layer_norm_eps": 1e-5, "num_register_tokens": 2}
    | {"intermediate_size": 64, "rope_theta": 100.0},
}


def clip_vision(kind: str) -> Any:
    """Return a CLIP_VISION of a kind in VISION."""
    from comfy.clip_vision import ClipVisionModel

    with torch.inference_mode():
        vision = ClipVisionModel(VISION[kind])
        randomise(vision.model, seed=3)
    return vision


def text_tower(width: int = WIDTH, projected: bool = True) -> Any:
    """Return a CLIP whose embeddings of texts have this width. projected: whether they are in the images' space."""
    import comfy.sd
    import comfy.sd1_clip
    import comfy.supported_models_base

    config = {"num_hidden_layers": 2, "hidden_size": width, "num_attention_heads": 4, "intermediate_size": 48}
    config |= {"hidden_act": "quick_gelu", "max_position_embeddings": 77, "eos_token_id": 49407}
    tower = partial(comfy.sd1_clip.SDClipModel, textmodel_json_config=config, return_projected_pooled=projected)
    target = comfy.supported_models_base.ClipTarget(
        comfy.sd1_clip.SD1Tokenizer, partial(comfy.sd1_clip.SD1ClipModel, clip_model=tower)
    )
    with torch.inference_mode():
        clip = comfy.sd.CLIP(target, disable_dynamic=True)
        randomise(clip.cond_stage_model, seed=4)
    return clip
