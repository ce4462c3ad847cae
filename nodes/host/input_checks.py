"""Checks of the MODEL, the LATENTs and the conditionings that a training gets, before any work is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...aclora_core.storage import tensors_in
from .families import check_family
from .private_keys import CAPTION_KEY

_SHOWN = 60  # characters of a caption in a message
_ONE_NODE = "Connect both outputs of one Load AC-LoRA Dataset node."


def check_inputs(model: Any, latents: Sequence[dict[str, Any]], conditioning: Sequence[Any]) -> None:
    """Check that a model can be trained on these images and captions.

    Args:
        model: the MODEL.
        latents: LATENTs of one image each.
        conditioning: the encoded caption of each image.

    Raises:
        ValueError: it cannot; the message says which image or caption is at fault, and what to do.
    """
    if not hasattr(getattr(model, "model", None), "diffusion_model"):
        raise ValueError(
            "The model input is not a diffusion model, so it cannot be trained. Connect a checkpoint's MODEL."
        )
    check_family(model.model)
    if len(latents) != len(conditioning):
        raise ValueError(
            f"There are {len(latents)} latents but {len(conditioning)} conditionings; each image needs its own "
            f"caption. {_ONE_NODE}"
        )
    if not latents:
        raise ValueError("There are no images to learn from. Connect a Load AC-LoRA Dataset node.")
    checked: set[int] = set()  # images with one caption share its tensors
    for number, (latent, caption) in enumerate(zip(latents, conditioning, strict=True), start=1):
        _check_latent(model.model.latent_format, number, latent)
        if id(caption) not in checked:
            _check_caption(f"Caption {number}", caption)
            checked.add(id(caption))


def check_unconditional(unconditional: Any) -> None:
    """Check the conditioning of the empty caption, if there is one. Raises ValueError if it cannot be used."""
    if unconditional is None:
        return
    if len(unconditional) != 1:
        raise ValueError(
            f"The unconditional is made of {len(unconditional)} conditionings. Connect a single CLIP Text Encode with "
            "an empty text, not a combination."
        )
    _check_caption("The unconditional", unconditional)


def _check_latent(latent_format: Any, number: int, latent: Any) -> None:
    samples = latent["samples"] if isinstance(latent, dict) and "samples" in latent else None
    if not isinstance(samples, Tensor):
        raise ValueError(f"Latent {number} holds no image. {_ONE_NODE}")
    channels = latent_format.latent_channels
    sides = max(2, latent_format.latent_dimensions)  # 3 for video models
    if samples.ndim != 2 + sides or samples.shape[1] != channels:
        raise ValueError(
            f"Latent {number} has the shape {tuple(samples.shape)}, but this model needs {channels} channels. "
            "Connect the VAE that belongs to the model to the dataset node."
        )
    if samples.shape[0] != 1:
        raise ValueError(
            f"Latent {number} holds {samples.shape[0]} images, which would share one caption. Give each image its own "
            "latent, as Load AC-LoRA Dataset does."
        )
    if not samples.numel():
        raise ValueError(
            f"Latent {number} is empty: its shape is {tuple(samples.shape)}. Use an image of at least "
            f"{latent_format.spacial_downscale_ratio} pixels on each side."
        )
    if not torch.isfinite(samples).all():
        raise ValueError(f"Latent {number} holds NaN or infinity. Load the VAE in fp32 (--fp32-vae) and try again.")


def _check_caption(name: str, conditioning: Any) -> None:
    """Check that a conditioning is one encoded text of finite numbers. name: for the message, such as "Caption 3"."""
    if not isinstance(conditioning, list | tuple) or not all(map(_is_encoded, conditioning)):
        raise ValueError(f"{name} is not a conditioning. {_ONE_NODE}")
    if len(conditioning) != 1:
        raise ValueError(
            f"{name} is made of {len(conditioning)} conditionings. Give each image a single one, not a combination."
        )
    encoded, more = conditioning[0]
    if CAPTION_KEY in more:
        name = f'{name} ("{_shortened(str(more[CAPTION_KEY]))}")'
    if not encoded.numel():
        raise ValueError(
            f"{name} is empty: its conditioning has the shape {tuple(encoded.shape)}. Encode it again, with the CLIP "
            "that belongs to the model."
        )
    if not all(torch.isfinite(tensor).all() for tensor in tensors_in(conditioning) if tensor.is_floating_point()):
        raise ValueError(
            f"{name} holds NaN or infinity, so nothing could be learned from it. Load the CLIP in fp32 "
            "(--fp32-text-enc), or change the caption, and run again."
        )


def _is_encoded(entry: Any) -> bool:
    return (
        isinstance(entry, list | tuple)
        and len(entry) == 2
        and isinstance(entry[0], Tensor)
        and isinstance(entry[1], dict)
    )


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
