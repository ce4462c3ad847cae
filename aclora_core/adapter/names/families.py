"""Families of models: what their layers are called in each format of LoRA files, and which format suits them best.

The format by default is the one that most programs read: kohya's for Stable Diffusion 1 and 2 and SDXL; diffusers'
where diffusers and ComfyUI agree on the name of every layer, since other programs read few or none of these in kohya's
format; else ComfyUI's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from .rule import COMFYUI_MODEL, Match, NameRule, by_comfyui, by_diffusers, by_kohya, kohya_name
from .transformers import AURAFLOW, FLUX, KREA_2, PIXART, SD3, Z_IMAGE
from .unets import clip_rules, unet_rules

FileFormat = Literal["ComfyUI", "kohya", "diffusers"]
BASE_MODEL = "aclora.base_model"  # in the metadata of files: ComfyUI's class of the model


@dataclass(frozen=True)
class Family:
    """Models whose layers have the same names."""

    automatic: FileFormat = "ComfyUI"
    rules: tuple[NameRule, ...] = ()
    same_names: bool = False  # whether the diffusion model's layers are called the same in diffusers

    def by_comfyui(self, name: str) -> Match | None:
        """Return the names of one of ComfyUI's layers, or None if it is of no kind that has others."""
        found = by_comfyui(self.rules).find(name)
        if found is None and name.startswith(COMFYUI_MODEL):
            theirs = ("transformer." + name.removeprefix(COMFYUI_MODEL),) if self.same_names else ()
            return Match(NameRule(name, kohya_name(name), theirs), ())
        return found

    def by_other(self, name: str) -> Match | None:
        """Return the names of a layer of kohya's or diffusers', or None."""
        found = by_kohya(self.rules).find(name) or by_diffusers(self.rules).find(name)
        if found is None and self.same_names and name.startswith("transformer."):
            return self.by_comfyui(COMFYUI_MODEL + name.removeprefix("transformer."))
        return found


_CLIP_L = clip_rules("clip_l", "lora_te1_", "text_encoder.", "lora_te1_text_projection")
_CLIP_G = clip_rules("clip_g", "lora_te2_", "text_encoder_2.", "lora_te2_text_projection")
_SD1 = Family("kohya", unet_rules(2, False, True) + clip_rules("clip_l", "lora_te_", "text_encoder.", _CLIP_L[0].kohya))
_SD2 = Family("kohya", unet_rules(2, False, True) + clip_rules("clip_h", "lora_te_", "text_encoder."))
_SDXL = Family("kohya", unet_rules(2, True) + _CLIP_L + _CLIP_G)
_KOALA = Family("kohya", unet_rules(1, True) + _CLIP_L + _CLIP_G)
_FLUX = Family("diffusers", FLUX + _CLIP_L)
_PIXART = Family("diffusers", PIXART)
_SAME = Family("diffusers", same_names=True)
_OTHER = Family()

# By ComfyUI's class of the model (comfy.supported_models).
_FAMILIES = {
    **dict.fromkeys(("SD15", "SD15_instructpix2pix"), _SD1),
    **dict.fromkeys(("SD20", "SD21UnclipL", "SD21UnclipH"), _SD2),
    **dict.fromkeys(("SDXL", "SDXL_instructpix2pix", "SSD1B", "Segmind_Vega"), _SDXL),
    "SDXLRefiner": Family("kohya", unet_rules(2, False) + clip_rules("clip_g", "lora_te_", "text_encoder.")),
    **dict.fromkeys(("KOALA_700M", "KOALA_1B"), _KOALA),
    "SD3": Family("diffusers", SD3 + _CLIP_L + _CLIP_G),
    **dict.fromkeys(("Flux", "FluxSchnell", "FluxInpaint"), _FLUX),
    "ZImage": Family("diffusers", Z_IMAGE),
    "AuraFlow": Family("diffusers", AURAFLOW),
    **dict.fromkeys(("PixArtAlpha", "PixArtSigma"), _PIXART),
    "Krea2": Family("diffusers", KREA_2),
    **dict.fromkeys(("QwenImage", "HiDream", "Kandinsky5", "Kandinsky5Image", "ErnieImage"), _SAME),
}

# How ss_base_model_version begins, without its punctuation -> ComfyUI's class.
_KOHYA_VERSIONS = {
    "sdxl": "SDXL",
    "sdv2": "SD20",
    "sdv1": "SD15",
    "sd15": "SD15",
    "sd1": "SD15",
    "sd2": "SD20",
    "sd3": "SD3",
    "flux1": "Flux",
    "zimage": "ZImage",
    "qwenimage": "QwenImage",
}


def family_of(base_model: str) -> Family:
    """Return the family of a model by ComfyUI's class of it, "" if it is not known."""
    return _FAMILIES.get(base_model, _OTHER)


def base_model_of(metadata: Mapping[str, str], names: Iterable[str]) -> str:
    """Return ComfyUI's class of the model that a LoRA is for, such as "SDXL"; "" if nothing tells it.

    Args:
        metadata: of the LoRA.
        names: of its layers, in any format.
    """
    return metadata.get(BASE_MODEL) or _trained(metadata) or _by_kohya(metadata) or _by_names(names)


def _trained(metadata: Mapping[str, str]) -> str:
    """Return the class in the settings of a training by this package."""
    try:
        settings = json.loads(metadata.get("aclora.settings", "{}"))
    except (ValueError, RecursionError):
        return ""
    return str(settings.get("base_model", "")) if isinstance(settings, dict) else ""


def _by_kohya(metadata: Mapping[str, str]) -> str:
    version = re.sub(r"[^a-z0-9]", "", metadata.get("ss_base_model_version", "").lower())
    if version in ("flux", "fluxdev"):
        return "Flux"
    return next((kind for start, kind in _KOHYA_VERSIONS.items() if version.startswith(start)), "")


# What only one kind of model has, in names whose underscores are dots.
_MARKS = {
    "SD3": r"joint\.blocks\.\d+\.(?:x|context)\.block",
    "SDXL": r"text\.encoders\.clip\.g|lora\.te2\.text\.model|text\.encoder\.2\.text\.model|label\.emb|add\.embedding"
    r"|(?:input|output)\.blocks\.\d+\.1\.transformer\.blocks\.[1-9]|attentions\.\d\.transformer\.blocks\.[1-9]",
    "SD20": r"text\.encoders\.clip\.h",
    "SD15": r"input\.blocks\.[12]\.1\.|output\.blocks\.(?:9|1[01])\.1\.|down\.blocks\.0\.attentions"
    r"|up\.blocks\.3\.attentions",
}


def _by_names(names: Iterable[str]) -> str:
    text = "\n".join(names).replace("_", ".")
    return next((kind for kind, mark in _MARKS.items() if re.search(mark, text)), "")
