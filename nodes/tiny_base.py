"""The node that gives the tiny base model which ships with the pack, built from the host's own parts."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import comfy.clip_model
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
from comfy_api.latest import io

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "tiny_base"
PARTS = ("denoiser", "text_encoder", "autoencoder")


def load_denoiser(disable_dynamic: bool = False):
    """The denoiser as the host's MODEL. It was trained without a shift of the timesteps, so it samples without one."""
    model = comfy.sd.load_diffusion_model(str(FOLDER / "denoiser.safetensors"), disable_dynamic=disable_dynamic)
    model.model.model_sampling.set_parameters(shift=1.0)
    model.cached_patcher_init = (load_denoiser, ())  # how the host makes a second copy
    return model


def _text_model(config: dict, dtype, device, operations):
    """The host's CLIP text model with the small vocabulary in place of CLIP's own."""
    model = comfy.clip_model.CLIPTextModel(config, dtype, device, operations)
    size = (config["vocab_size"], config["hidden_size"])
    model.set_input_embeddings(operations.Embedding(*size, dtype=dtype, device=device))
    return model


def load_text_encoder(disable_dynamic: bool = False):
    """The text encoder and its tokenizer as the host's CLIP."""
    settings = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    config, length = settings["text"], settings["length"]
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
        tokenizer_path=str(FOLDER / "tokenizer"),
        max_length=length,
        embedding_size=config["hidden_size"],
    )
    target = comfy.supported_models_base.ClipTarget(
        functools.partial(comfy.sd1_clip.SD1Tokenizer, tokenizer=tokenizer),
        functools.partial(comfy.sd1_clip.SD1ClipModel, clip_model=encoder),
    )
    weights = comfy.utils.load_torch_file(str(FOLDER / "text_encoder.safetensors"))
    size = comfy.utils.calculate_parameters(weights)
    clip = comfy.sd.CLIP(target, parameters=size, state_dict=[weights], disable_dynamic=disable_dynamic)
    clip.patcher.cached_patcher_init = (_text_encoder_patcher, ())  # how the host makes a second copy
    return clip


def _text_encoder_patcher(disable_dynamic: bool = False):
    return load_text_encoder(disable_dynamic).patcher


def load_autoencoder():
    """The autoencoder as the host's VAE."""
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(FOLDER / "autoencoder.safetensors")))


class ACLoRATinyBase(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ACLoRATinyBase",
            display_name="Load AC-LoRA Tiny Base",
            category="AC-LoRA",
            description="Loads the small icon model that ships with AC-LoRA, so that a style can be learned and drawn "
            "anywhere with nothing to download.",
            search_aliases=["tiny model", "example checkpoint", "test model", "icon model", "load checkpoint"],
            inputs=[],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="Draws icons of 128 × 128 pixels, in the styles noto, twemoji, emojione and fluent.",
                ),
                io.Clip.Output(
                    display_name="clip",
                    tooltip='Reads prompts such as "a rocket, noto style". Words it never saw are read in parts.',
                ),
                io.Vae.Output(display_name="vae", tooltip="Turns pictures into latents of 16 channels and back."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        missing = [part for part in PARTS if not (FOLDER / f"{part}.safetensors").is_file()]
        if missing:
            raise FileNotFoundError(
                f"The tiny base is incomplete: {', '.join(missing)} missing in assets/tiny_base. "
                "Install the pack again."
            )
        return io.NodeOutput(load_denoiser(), load_text_encoder(), load_autoencoder())
