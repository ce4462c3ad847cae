"""The key formats of LoRA files: which endings ComfyUI reads, and which belong together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Endings of the key of lora_up (out x rank) and of lora_down (rank x in), in the order in which ComfyUI tries them.
PAIRS = (
    (".lora_up.weight", ".lora_down.weight"),  # kohya, and what this package writes
    ("_lora.up.weight", "_lora.down.weight"),  # diffusers, old
    (".lora_B.weight", ".lora_A.weight"),  # PEFT
    (".lora.up.weight", ".lora.down.weight"),  # diffusers
    (".lora_B", ".lora_A"),  # Mochi
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),  # transformers
    (".lora_B.default.weight", ".lora_A.default.weight"),  # PEFT with an adapter name
)


ALPHA = ".alpha"


# Endings of the keys of everything that is no plain LoRA.
KINDS = {
    **dict.fromkeys((".lokr_w1", ".lokr_w1_a", ".lokr_w1_b", ".lokr_w2", ".lokr_w2_a", ".lokr_w2_b"), "LoKr"),
    ".lokr_t2": "LoKr",
    **dict.fromkeys((".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".hada_t1", ".hada_t2"), "LoHa"),
    **dict.fromkeys((".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight"), "GLoRA"),
    **dict.fromkeys((".oft_blocks", ".rescale"), "OFT"),  # BOFT where the blocks have four dimensions
    ".dora_scale": "DoRA",
    **dict.fromkeys((".lora_magnitude_vector", ".lora_magnitude_vector.weight"), "DoRA"),
    ".lora_magnitude_vector.default.weight": "DoRA",
    ".lora_mid.weight": "Tucker LoRA",
    ".reshape_weight": "LoRA on a reshaped weight",
    ".diff": "full difference",
    ".diff_b": "bias difference",
    ".set_weight": "replaced weight",
    **dict.fromkeys((".w_norm", ".b_norm"), "norm difference"),
}


# What a kind needs to be whole: one of the alternatives of every line.
NEEDS: dict[str, tuple[tuple[tuple[str, ...], ...], ...]] = {
    "LoKr": (((".lokr_w1",), (".lokr_w1_a", ".lokr_w1_b")), ((".lokr_w2",), (".lokr_w2_a", ".lokr_w2_b"))),
    "LoHa": (((".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b"),),),
    "GLoRA": (((".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight"),),),
    "OFT": (((".oft_blocks",),),),
}


ADDITIONS = {"DoRA", "Tucker LoRA", "LoRA on a reshaped weight"}  # kinds that mean nothing by themselves


SUFFIXES = sorted((ALPHA, *KINDS, *(suffix for pair in PAIRS for suffix in pair)), key=len, reverse=True)


# The USO release for Flux: its spelling and ComfyUI's, replaced one after the other.
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


def host_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Three releases with spellings of their own, in the names that ComfyUI gives them on loading."""
    if "img_in.lora_A.weight" in state_dict and "single_blocks.0.norm.key_norm.scale" in state_dict:
        # Black Forest Labs' control LoRAs for Flux; their first layer takes more channels than the model's.
        renamed = {}
        for key, tensor in state_dict.items():
            name = key.replace(".lora_B.bias", ".diff_b").replace("_norm.scale", "_norm.set_weight")
            renamed[f"diffusion_model.{name}"] = tensor
        shape = (state_dict["img_in.lora_B.weight"].shape[0], state_dict["img_in.lora_A.weight"].shape[1])
        return {**renamed, "diffusion_model.img_in.reshape_weight": torch.tensor(shape)}
    if "lora_unet__blocks_0_cross_attn_k.lora_down.weight" in state_dict:  # Wan Fun
        return {
            f"lora_unet_{key.removeprefix('lora_unet__')}" if key.startswith("lora_unet__") else key: tensor
            for key, tensor in state_dict.items()
        }
    if USO_MARK in state_dict:
        renamed = {}
        for key, tensor in state_dict.items():
            for theirs, ours in USO_NAMES.items():
                key = key.replace(theirs, ours)
            renamed["diffusion_model." + key] = tensor
        return renamed
    return dict(state_dict)


def group_by_base(tensors: Mapping[str, Tensor]) -> tuple[dict[str, set[str]], list[str]]:
    """The suffixes found for each base name, and the keys with no suffix that is known."""
    found: dict[str, set[str]] = {}
    unknown = []
    for key in tensors:
        suffix = next((suffix for suffix in SUFFIXES if key.endswith(suffix) and key != suffix), None)
        if suffix is None:
            unknown.append(key)
        else:
            found.setdefault(key.removesuffix(suffix), set()).add(suffix)
    return found, unknown


def find_pair(base: str, suffixes: set[str]) -> tuple[str, str] | None:
    """The endings of the two matrices of a plain LoRA, or None where it has none; half a pair is a ValueError."""
    pairs = [pair for pair in PAIRS if suffixes & set(pair)]
    for up, down in pairs:
        for missing, present in ((up, down), (down, up)):
            if missing not in suffixes:
                raise ValueError(f"'{base}{missing}' is missing beside '{base}{present}'. {INCOMPLETE}")
    if len(pairs) > 1:
        raise ValueError(f"'{base}{pairs[0][0]}' and '{base}{pairs[1][0]}' are both there. Keep one of the two.")
    return pairs[0] if pairs else None


def find_kinds(base: str, suffixes: set[str], tensors: Mapping[str, Tensor]) -> set[str]:
    """What a base name holds besides a plain LoRA; a kind with a part missing is a ValueError that names the key."""
    kinds = {KINDS[suffix] for suffix in suffixes if suffix in KINDS}
    for kind in sorted(kinds):
        for alternatives in NEEDS.get(kind, ()):
            # Of two ways to store a matrix, the one that was begun is the one that is incomplete.
            begun = max(alternatives, key=lambda alternative: len(suffixes & set(alternative)) / len(alternative))
            for suffix in begun:
                if suffix not in suffixes:
                    raise ValueError(f"'{base}{suffix}' is missing from the {kind} layer. {INCOMPLETE}")
    if "OFT" in kinds and tensors[f"{base}.oft_blocks"].ndim == 4:
        return kinds - {"OFT"} | {"BOFT"}
    return kinds
