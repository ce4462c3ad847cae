"""Which of the host's models learn from pictures with captions, and what to know of some that do.

By the host's classes: the first of a model's class and of those that it derives from that is named here counts.
"""

from __future__ import annotations

from typing import Any

import torch
from comfy.model_base import BaseModel
from torch import Tensor

_FROM_TEXT = "Connect a model that draws pictures from text."
_BASE = "Train the text-to-picture or text-to-video model that it was made from; its LoRA can be loaded with this one."

_SOUND = f"This model makes sound, not pictures. {_FROM_TEXT}"
_FILMS_WITH_SOUND = f"This model makes a film and its sound as one, and pictures have no sound. {_FROM_TEXT}"
_SHAPES = f"This model makes shapes in space out of a picture, not pictures out of text. {_FROM_TEXT}"
_SEES = f"This model looks at pictures and draws none. {_FROM_TEXT}"
_NO_TEXT = f"This model draws from another picture alone and takes no text. {_FROM_TEXT}"
_REPAIRS = f"This model draws details into another picture, and a picture with a caption has none to give. {_FROM_TEXT}"
_FOLLOWS = (
    "This model follows another picture, a film or a sound, and pictures with captions have none to give it, so that "
    f"its LoRA would learn to do without. {_BASE}"
)
_OVERWRITES = (
    "ComfyUI's code for this model writes over values from which the LoRA's gradient would be computed, so it cannot "
    f"be trained. {_FROM_TEXT}"
)
_STAGE_B = (
    "This is stage B of Stable Cascade, which only draws details into what stage C has drawn. Connect the MODEL of "
    "stage C and its VAE: a style is learned there."
)
_FEW_STEPS = (
    "This model was made to draw in a few steps, for which it is told where each step ends. Training has no such "
    "steps. Train the model that it was made from; its LoRA can be loaded with this one."
)

# By the names of classes in comfy.model_base, as not every version of the host has all of them.
_REFUSED = {
    **dict.fromkeys(("StableAudio1", "StableAudio3", "ACEStep", "ACEStep15"), _SOUND),
    **dict.fromkeys(("LTXAV", "MiniMaxH3"), _FILMS_WITH_SOUND),
    **dict.fromkeys(("Hunyuan3Dv2", "Hunyuan3Dv2_1", "TripoSplat"), _SHAPES),
    **dict.fromkeys(("RT_DETR_v4", "SAM3", "DepthAnything3"), _SEES),
    **dict.fromkeys(("SVD_img2vid", "Stable_Zero123"), _NO_TEXT),
    **dict.fromkeys(("SD_X4Upscaler", "SeedVR2", "PiD"), _REPAIRS),
    **dict.fromkeys(("HunyuanImage21Refiner", "HunyuanVideo15_SR_Distilled"), _REPAIRS),
    **dict.fromkeys(("WAN21_Vace", "WAN21_Camera", "WAN21_HuMo", "WAN22_S2V"), _FOLLOWS),
    **dict.fromkeys(("WAN22_Animate", "WAN21_SCAIL", "WAN22_WanDancer"), _FOLLOWS),
    **dict.fromkeys(("LTXV", "PixelDiTT2I"), _OVERWRITES),
    "StableCascade_B": _STAGE_B,
}
_WITHOUT = "It is trained without one, so the LoRA learns to draw from text."
_NOTES = {
    "IP2P": f"This model is made to change another picture by words. {_WITHOUT}",
    "SD21UNCLIP": f"This model can take a picture beside the words. {_WITHOUT}",
}
_FILLS_IN = (
    "This model is made to fill in a part of a picture. It is trained as if all of it were to be filled in, so the "
    "LoRA learns to draw from text."
)
_TEXT_LIKE_OTHERS = ("Kandinsky5", "HunyuanVideo15")  # take a second picture always; for text alone it is empty


def check_family(base: Any) -> None:
    """base: the host's BaseModel. Raises ValueError if nothing would be learned from pictures with captions."""
    reason = _named(base, _REFUSED)
    if reason is None and getattr(base.diffusion_model, "time_r_in", None) is not None:
        reason = _FEW_STEPS
    if reason is None and _other_picture(base) is not None and not _fills_in(base) and not _named(base, _NOTES):
        reason = _FOLLOWS
    if reason is not None:
        raise ValueError(reason)


def note_on(model: Any) -> str | None:
    """A sentence for the user on what training means for this MODEL, where it was made for more than text."""
    base = model.model
    return _FILLS_IN if _fills_in(base) else _named(base, _NOTES)


def options_for_training(base: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The MODEL's transformer_options, such that the network computes every step from its start."""
    if not _is_one_of(base, ("HiDreamO1",)):
        return options
    # HiDream-O1 keeps what it made of the words for the next step, when the LoRA has changed. It does not where a block
    # is replaced; this one does not exist.
    replaced = options.get("patches_replace", {})
    nowhere = {("double_block", -1): None}
    return {**options, "patches_replace": {**replaced, "dit": {**replaced.get("dit", {}), **nowhere}}}


def _named(base: Any, sentences: dict[str, str]) -> str | None:
    return next((sentences[kind.__name__] for kind in type(base).__mro__ if kind.__name__ in sentences), None)


def _is_one_of(base: Any, names: tuple[str, ...]) -> bool:
    return any(kind.__name__ in names for kind in type(base).__mro__)


def _other_picture(base: Any) -> Tensor | None:
    """The channels that the network takes beside those of the latent, as the host fills them for text alone."""
    hosts_own = type(base).concat_cond.__module__ == BaseModel.__module__  # another pack's may ask for more than text
    if not hosts_own or _is_one_of(base, _TEXT_LIKE_OTHERS):
        return None
    sides = (8, 8) if base.latent_format.latent_dimensions < 3 else (1, 8, 8)
    empty = torch.zeros(1, base.latent_format.latent_channels, *sides)
    given: Tensor | None = base.concat_cond(noise=empty, latent_image=empty, device=empty.device)
    return given


def _fills_in(base: Any) -> bool:
    """Whether those channels are a picture and a mask of what to fill in, which is all of it for text alone."""
    if "mask" in base.concat_keys:
        return True
    given = _other_picture(base) if _is_one_of(base, ("Flux",)) else None
    return given is not None and given.shape[1] > base.latent_format.latent_channels
