"""Key formats of LoRA files: the key endings that ComfyUI reads, and which of them form one layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .left_out import INCOMPLETE_LAYER, UnusableLayerError


class KeyFormat(NamedTuple):
    """The key endings of a plain LoRA layer in one format."""

    up: str  # ending of the key of lora_up, (out, rank)
    down: str  # ending of the key of lora_down, (rank, in)
    name: str  # for the user


# In the order in which ComfyUI tries them. The first is ComfyUI's own.
KEY_FORMATS = (
    KeyFormat(".lora_up.weight", ".lora_down.weight", "kohya"),
    KeyFormat("_lora.up.weight", "_lora.down.weight", "diffusers, old"),
    KeyFormat(".lora_B.weight", ".lora_A.weight", "PEFT"),
    KeyFormat(".lora.up.weight", ".lora.down.weight", "diffusers"),
    KeyFormat(".lora_B", ".lora_A", "Mochi"),
    KeyFormat(".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight", "transformers"),
    KeyFormat(".lora_B.default.weight", ".lora_A.default.weight", "PEFT with an adapter's name"),
)


def diffusers_keys(base: str) -> KeyFormat:
    """Return the key endings of a layer with one of diffusers' names, as both diffusers and ComfyUI read them."""
    if base.startswith("unet."):
        return KEY_FORMATS[1] if ".processor." in base else KEY_FORMATS[3]
    return KEY_FORMATS[2]


ALPHA = ".alpha"
DORA_SCALE = ".dora_scale"


# Key endings of layers of other kinds -> the kind.
KINDS = {
    **dict.fromkeys((".lokr_w1", ".lokr_w1_a", ".lokr_w1_b", ".lokr_w2", ".lokr_w2_a", ".lokr_w2_b"), "LoKr"),
    ".lokr_t2": "LoKr",
    **dict.fromkeys((".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".hada_t1", ".hada_t2"), "LoHa"),
    **dict.fromkeys((".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight"), "GLoRA"),
    **dict.fromkeys((".oft_blocks", ".rescale"), "OFT"),  # BOFT where the blocks have four dimensions
    DORA_SCALE: "DoRA",
    **dict.fromkeys((".lora_magnitude_vector", ".lora_magnitude_vector.weight"), "DoRA of PEFT"),
    ".lora_magnitude_vector.default.weight": "DoRA of PEFT",
    ".lora_mid.weight": "Tucker LoRA",
    ".reshape_weight": "LoRA on a reshaped weight",
    ".diff": "full difference",
    ".diff_b": "bias difference",
    ".set_weight": "replaced weight",
    **dict.fromkeys((".w_norm", ".b_norm"), "norm difference"),
}


# The endings that a complete layer of a kind needs: for every matrix, one of the alternatives.
REQUIRED_SUFFIXES: dict[str, tuple[tuple[tuple[str, ...], ...], ...]] = {
    "LoKr": (((".lokr_w1",), (".lokr_w1_a", ".lokr_w1_b")), ((".lokr_w2",), (".lokr_w2_a", ".lokr_w2_b"))),
    "LoHa": (((".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b"),),),
    "GLoRA": (((".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight"),),),
    "OFT": (((".oft_blocks",),),),
}


# Kinds that only modify a plain LoRA beside them.
ADDON_KINDS = {"DoRA", "DoRA of PEFT", "Tucker LoRA", "LoRA on a reshaped weight"}


PLAIN_SUFFIXES = {suffix for form in KEY_FORMATS for suffix in (form.up, form.down)}


SUFFIXES = sorted((ALPHA, *KINDS, *PLAIN_SUFFIXES), key=len, reverse=True)  # longest first


# PEFT's keys with the name of an adapter, of which ComfyUI reads "default" only.
_NAMED_ADAPTER = re.compile(r"(.+\.lora_(?:A|B|magnitude_vector))\.(?!weight$|bias$)([^.]+?)(?:\.weight)?")


# Key parts of the USO release for Flux -> ComfyUI's, replaced in this order.
USO_NAMES = {
    ".down.weight": ".lora_down.weight",
    ".up.weight": ".lora_up.weight",
    ".qkv_lora2.": ".txt_attn.qkv.",
    ".qkv_lora1.": ".img_attn.qkv.",
    ".proj_lora1.": ".img_attn.proj.",
    ".proj_lora2.": ".txt_attn.proj.",
    ".qkv_lora.": ".linear1_qkv.",
    ".proj_lora.": ".linear2.",
    ".processor.": ".",
}


USO_MARK = "single_blocks.37.processor.qkv_lora.up.weight"


INCOMPLETE = "The LoRA is incomplete: save or download it again."


def to_comfyui_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename keys in spellings of their own to those that ComfyUI reads.

    Three releases are renamed as ComfyUI does on loading. Where PEFT's keys hold the name of an adapter, one adapter is
    named "default": the one of that name, else the first.

    Returns:
        A new dict with the same tensors; other files keep their keys.
    """
    if "img_in.lora_A.weight" in state_dict and "single_blocks.0.norm.key_norm.scale" in state_dict:
        return _flux_control_keys(state_dict)
    if "lora_unet__blocks_0_cross_attn_k.lora_down.weight" in state_dict:
        return _wan_fun_keys(state_dict)
    if USO_MARK in state_dict:
        return _uso_keys(state_dict)
    return _one_adapter_keys(state_dict)


def _flux_control_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Black Forest Labs' control LoRAs for Flux; their first layer takes more channels than the model's."""
    renamed = {}
    for key, tensor in state_dict.items():
        name = key.replace(".lora_B.bias", ".diff_b").replace("_norm.scale", "_norm.set_weight")
        renamed[f"diffusion_model.{name}"] = tensor
    shape = (state_dict["img_in.lora_B.weight"].shape[0], state_dict["img_in.lora_A.weight"].shape[1])
    return {**renamed, "diffusion_model.img_in.reshape_weight": torch.tensor(shape)}


def _wan_fun_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, tensor in state_dict.items():
        if key.startswith("lora_unet__"):
            key = "lora_unet_" + key.removeprefix("lora_unet__")
        renamed[key] = tensor
    return renamed


def _uso_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, tensor in state_dict.items():
        for theirs, comfyui in USO_NAMES.items():
            key = key.replace(theirs, comfyui)
        renamed["diffusion_model." + key] = tensor
    return renamed


def _one_adapter_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    matches = {key: match for key in state_dict if (match := _NAMED_ADAPTER.fullmatch(key))}
    names = [match[2] for match in matches.values()]
    read = "default" if "default" in names else next(iter(names), "")
    renamed = {key: f"{match[1]}.default.weight" for key, match in matches.items() if match[2] == read}
    return {renamed.get(key, key): tensor for key, tensor in state_dict.items()}


def suffixes_by_base(tensors: Mapping[str, Tensor]) -> tuple[dict[str, set[str]], list[str]]:
    """Split keys into base names and known endings.

    Returns:
        Base name -> its endings, and the keys without a known ending.
    """
    found: dict[str, set[str]] = {}
    unknown = []
    for key in tensors:
        base, suffix = split_key(key)
        if suffix:
            found.setdefault(base, set()).add(suffix)
        else:
            unknown.append(key)
    return found, unknown


def split_key(key: str) -> tuple[str, str]:
    """Return the base name and the known ending of a key; the whole key and "" if it has none."""
    suffix = next((suffix for suffix in SUFFIXES if key.endswith(suffix) and key != suffix), "")
    return key.removesuffix(suffix), suffix


def find_key_format(suffixes: set[str]) -> KeyFormat | None:
    """Return the first format of which a layer has both factors, or None if there is none."""
    return next((form for form in KEY_FORMATS if {form.up, form.down} <= suffixes), None)


def missing_half(suffixes: set[str]) -> tuple[str, str]:
    """Return the ending of the factor that is missing, and of the one that is there, of a layer with half a pair."""
    form = next(form for form in KEY_FORMATS if suffixes & {form.up, form.down})
    return (form.up, form.down) if form.down in suffixes else (form.down, form.up)


def find_kinds(base: str, suffixes: set[str], tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the kinds of a layer besides a plain LoRA; empty for a plain LoRA.

    Raises:
        UnusableLayerError: a tensor that the kind needs is missing; the key is named.
    """
    kinds = {KINDS[suffix] for suffix in suffixes if suffix in KINDS}
    for kind in sorted(kinds):
        for alternatives in REQUIRED_SUFFIXES.get(kind, ()):
            # Of two ways to store a matrix, report the one of which more is there.
            begun = max(alternatives, key=lambda alternative: len(suffixes & set(alternative)) / len(alternative))
            for suffix in begun:
                if suffix not in suffixes:
                    message = f"'{base}{suffix}' is missing from the {kind} layer. {INCOMPLETE}"
                    raise UnusableLayerError(f"{INCOMPLETE_LAYER} of the kind {kind}", message)
    if "OFT" in kinds and tensors[f"{base}.oft_blocks"].ndim == 4:
        return kinds - {"OFT"} | {"BOFT"}
    return kinds
