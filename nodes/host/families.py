"""Model families that cannot be trained on captioned images, and notes on some that can.

Families are ComfyUI's model classes. A model belongs to the first class named here among its own class and its bases.
"""

from __future__ import annotations

from typing import Any

import torch
from comfy.model_base import BaseModel
from torch import Tensor

_FROM_TEXT = "Connect a text-to-image model."
_BASE = "Train the text-to-image or text-to-video model that it was made from; its LoRA can be loaded with this one."

_SOUND = f"This model generates sound, not images. {_FROM_TEXT}"
_VIDEO_WITH_SOUND = f"This model generates a video together with its sound, and images have no sound. {_FROM_TEXT}"
_SHAPES = f"This model generates 3D shapes from an image, not images from text. {_FROM_TEXT}"
_ANALYSES = f"This model analyses images and generates none. {_FROM_TEXT}"
_NO_TEXT = f"This model generates from another image alone and takes no text. {_FROM_TEXT}"
_REFINES = f"This model refines another image, and captioned images come without one. {_FROM_TEXT}"
_FOLLOWS = (
    "This model follows another image, a video or a sound. Captioned images come without one, so the LoRA would "
    f"learn to do without it. {_BASE}"
)
_OVERWRITES = (
    "ComfyUI's code for this model overwrites values that the LoRA's gradient is computed from, so it cannot be "
    f"trained. {_FROM_TEXT}"
)
_STAGE_B = (
    "This is stage B of Stable Cascade, which only refines the output of stage C. Connect the MODEL of stage C and its "
    "VAE: a style is learned there."
)
_FEW_STEPS = (
    "This model was distilled to sample in few steps and takes the end of each step as an input, which training does "
    "not have. Train the model that it was made from; its LoRA can be loaded with this one."
)

# By class name in comfy.model_base, as not every version of ComfyUI has all of these classes.
_REFUSED = {
    **dict.fromkeys(("StableAudio1", "StableAudio3", "ACEStep", "ACEStep15"), _SOUND),
    **dict.fromkeys(("LTXAV", "MiniMaxH3"), _VIDEO_WITH_SOUND),
    **dict.fromkeys(("Hunyuan3Dv2", "Hunyuan3Dv2_1", "TripoSplat"), _SHAPES),
    **dict.fromkeys(("RT_DETR_v4", "SAM3", "DepthAnything3"), _ANALYSES),
    **dict.fromkeys(("SVD_img2vid", "Stable_Zero123"), _NO_TEXT),
    **dict.fromkeys(("SD_X4Upscaler", "SeedVR2", "PiD"), _REFINES),
    **dict.fromkeys(("HunyuanImage21Refiner", "HunyuanVideo15_SR_Distilled"), _REFINES),
    **dict.fromkeys(("WAN21_Vace", "WAN21_Camera", "WAN21_HuMo", "WAN22_S2V"), _FOLLOWS),
    **dict.fromkeys(("WAN22_Animate", "WAN21_SCAIL", "WAN22_WanDancer"), _FOLLOWS),
    **dict.fromkeys(("LTXV", "PixelDiTT2I"), _OVERWRITES),
    "StableCascade_B": _STAGE_B,
}
_WITHOUT = "It is trained without one, so the LoRA learns to generate from text."
_NOTES = {
    "IP2P": f"This model is made to edit another image by instruction. {_WITHOUT}",
    "SD21UNCLIP": f"This model can take an image beside the text. {_WITHOUT}",
}
_INPAINTING = (
    "This model is made to fill in parts of an image (inpainting). It is trained to fill in whole images, so the LoRA "
    "learns to generate from text."
)
_TEXT_LIKE_OTHERS = ("Kandinsky5", "HunyuanVideo15")  # always take a second image, which is empty for text alone


def check_family(base: Any) -> None:
    """Check that a model can be trained on captioned images.

    Args:
        base: ComfyUI's BaseModel.

    Raises:
        ValueError: it cannot; the message says why and what to train instead.
    """
    reason = _named(base, _REFUSED)
    if reason is None and getattr(base.diffusion_model, "time_r_in", None) is not None:
        reason = _FEW_STEPS
    if reason is None and _extra_channels(base) is not None and not _is_inpainting(base) and not _named(base, _NOTES):
        reason = _FOLLOWS
    if reason is not None:
        raise ValueError(reason)


def training_note(model: Any) -> str | None:
    """Return a note for the user on training a MODEL that was made for more than text; None for other models."""
    base = model.model
    return _INPAINTING if _is_inpainting(base) else _named(base, _NOTES)


def training_options(base: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return the MODEL's transformer_options, changed so that the network caches nothing from step to step.

    Args:
        base: ComfyUI's BaseModel.
        options: the MODEL's transformer_options.
    """
    if not _is_one_of(base, ("HiDreamO1",)):
        return options
    # HiDream-O1 caches its text features for the next step, when the LoRA has changed. It does not if any block is
    # replaced; the block replaced here does not exist.
    replaced = options.get("patches_replace", {})
    nowhere = {("double_block", -1): None}
    return {**options, "patches_replace": {**replaced, "dit": {**replaced.get("dit", {}), **nowhere}}}


def _named(base: Any, sentences: dict[str, str]) -> str | None:
    return next((sentences[kind.__name__] for kind in type(base).__mro__ if kind.__name__ in sentences), None)


def _is_one_of(base: Any, names: tuple[str, ...]) -> bool:
    return any(kind.__name__ in names for kind in type(base).__mro__)


def _extra_channels(base: Any) -> Tensor | None:
    """Return the input channels beside those of the latent, as ComfyUI fills them for text alone; None if none."""
    # The method of another pack may need more than text.
    is_comfyuis = type(base).concat_cond.__module__ == BaseModel.__module__
    if not is_comfyuis or _is_one_of(base, _TEXT_LIKE_OTHERS):
        return None
    sides = (8, 8) if base.latent_format.latent_dimensions < 3 else (1, 8, 8)
    empty = torch.zeros(1, base.latent_format.latent_channels, *sides)
    given: Tensor | None = base.concat_cond(noise=empty, latent_image=empty, device=empty.device)
    return given


def _is_inpainting(base: Any) -> bool:
    """Whether the extra channels are a masked image and its mask, which covers all of it for text alone."""
    if "mask" in base.concat_keys:
        return True
    given = _extra_channels(base) if _is_one_of(base, ("Flux",)) else None
    return given is not None and given.shape[1] > base.latent_format.latent_channels
