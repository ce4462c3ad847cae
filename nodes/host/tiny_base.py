"""Loaders of the tiny base model, built from ComfyUI's own parts."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import comfy.clip_model
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils


def load_tiny_denoiser(folder: Path, disable_dynamic: bool = False) -> Any:
    """Load the denoiser as ComfyUI's MODEL. It was trained without a timestep shift, so it samples without one.

    Args:
        folder: of the tiny base.
        disable_dynamic: switches ComfyUI's dynamic loading of weights off, as in its own loaders.
    """
    model = comfy.sd.load_diffusion_model(str(folder / "denoiser.safetensors"), disable_dynamic=disable_dynamic)
    model.model.model_sampling.set_parameters(shift=1.0)
    model.cached_patcher_init = (load_tiny_denoiser, (folder,))  # ComfyUI's way to load it again
    return model


def load_tiny_text_encoder(folder: Path, disable_dynamic: bool = False) -> Any:
    """Load the text encoder and its tokenizer as ComfyUI's CLIP. Arguments as for load_tiny_denoiser."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    target = _clip_target(settings["text"], settings["length"], folder / "tokenizer")
    weights = comfy.utils.load_torch_file(str(folder / "text_encoder.safetensors"))
    size = comfy.utils.calculate_parameters(weights)
    clip = comfy.sd.CLIP(target, parameters=size, state_dict=[weights], disable_dynamic=disable_dynamic)
    clip.patcher.cached_patcher_init = (_text_encoder_patcher, (folder,))  # ComfyUI's way to load it again
    return clip


def load_tiny_autoencoder(folder: Path) -> Any:
    """Load the autoencoder as ComfyUI's VAE."""
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(folder / "autoencoder.safetensors")))


def _clip_target(config: dict[str, Any], length: int, tokenizer_folder: Path) -> Any:
    """Return ComfyUI's description of a CLIP with the tiny base's text model and tokenizer."""
    end = config["eos_token_id"]
    encoder = functools.partial(
        comfy.sd1_clip.SDClipModel,
        max_length=length,
        textmodel_json_config=config,
        special_tokens={"start": end - 1, "end": end, "pad": end},
        model_class=_text_model,
    )
    tokenizer = functools.partial(
        comfy.sd1_clip.SDTokenizer,
        tokenizer_path=str(tokenizer_folder),
        max_length=length,
        embedding_size=config["hidden_size"],
    )
    return comfy.supported_models_base.ClipTarget(
        functools.partial(comfy.sd1_clip.SD1Tokenizer, tokenizer=tokenizer),
        functools.partial(comfy.sd1_clip.SD1ClipModel, clip_model=encoder),
    )


def _text_model(config: dict[str, Any], dtype: Any, device: Any, operations: Any) -> Any:
    """Build ComfyUI's CLIP text model with the small vocabulary in place of CLIP's own."""
    model = comfy.clip_model.CLIPTextModel(config, dtype, device, operations)
    size = (config["vocab_size"], config["hidden_size"])
    model.set_input_embeddings(operations.Embedding(*size, dtype=dtype, device=device))
    return model


def _text_encoder_patcher(folder: Path, disable_dynamic: bool = False) -> Any:
    return load_tiny_text_encoder(folder, disable_dynamic).patcher
