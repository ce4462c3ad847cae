"""Read LoRA files in every key format that ComfyUI reads, and write them in ComfyUI's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..storage import read_safetensors, write_safetensors
from .adapter import Adapter, Layer, is_finite
from .key_formats import (
    ADDON_KINDS,
    ALPHA,
    INCOMPLETE,
    KEY_FORMATS,
    KINDS,
    KeyFormat,
    find_key_format,
    find_kinds,
    suffixes_by_base,
    to_comfyui_keys,
)


def load(path: str | Path) -> Adapter:
    """Read a LoRA file in any key format.

    Raises:
        FileNotFoundError, ValueError: the file or one of its layers is not usable; the message names file and key.
    """
    state_dict, metadata = read_safetensors(path)
    try:
        return from_state_dict(state_dict, metadata)
    except ValueError as error:
        raise ValueError(f"{Path(path).name}: {error}") from error


def save(adapter: Adapter, path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write a LoRA file in ComfyUI's key format, atomically, each tensor in the type it has.

    Args:
        metadata: of the file, in place of adapter.metadata; two hashes of the tensors are added.

    Raises:
        ValueError: the adapter is empty or holds NaN or infinity, or the metadata does not fit into 1 MiB.
        OSError: the file cannot be written; the old file is unchanged.
    """
    state_dict = to_state_dict(adapter)
    if not state_dict:
        raise ValueError("The LoRA has no layers, so there is nothing to save. Connect a trained LoRA.")
    _check_finite(state_dict)
    write_safetensors(path, state_dict, metadata)


def to_state_dict(adapter: Adapter) -> dict[str, Tensor]:
    """Return ComfyUI's LORA_MODEL: `<base>.lora_up.weight`, `.lora_down.weight` and `.alpha` per layer, and `extra`."""
    written = KEY_FORMATS[0]
    state_dict: dict[str, Tensor] = {}
    for base, layer in adapter.layers.items():
        state_dict[base + written.up] = layer.lora_up.contiguous()
        state_dict[base + written.down] = layer.lora_down.contiguous()
        state_dict[base + ALPHA] = torch.tensor(layer.alpha, dtype=torch.float32)
    return {**state_dict, **{key: tensor.contiguous() for key, tensor in adapter.extra.items()}}


def from_state_dict(state_dict: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Adapter:
    """Build an adapter from the tensors of a LoRA in any key format; they are not copied.

    A layer without an alpha has the scale 1, as in ComfyUI.

    Raises:
        ValueError: there is no LoRA, a key is missing or unpaired, or a tensor holds NaN or infinity.
    """
    tensors = to_comfyui_keys(state_dict)
    found, unknown = suffixes_by_base(tensors)
    if not found:
        example = f"; its first key is '{next(iter(tensors))}'" if tensors else ""
        raise ValueError(f"There is no LoRA in it: {len(tensors)} tensors{example}. Choose a LoRA file.")
    _check_finite(tensors)
    layers: dict[str, Layer] = {}
    other = dict.fromkeys(unknown, "unknown key")
    extra = {key: tensors[key] for key in unknown}
    for base, suffixes in found.items():
        form = find_key_format(base, suffixes)
        kinds = find_kinds(base, suffixes, tensors)
        if form is None and kinds <= ADDON_KINDS:
            raise ValueError(f"'{base}{min(suffixes)}' has no lora_up and lora_down beside it. {INCOMPLETE}")
        if kinds:
            other[base] = ", ".join(sorted(kinds))
        if form is not None and kinds <= {"bias difference"}:
            layers[base] = _layer(base, form, tensors)
            suffixes = suffixes & KINDS.keys()
        extra.update({base + suffix: tensors[base + suffix] for suffix in sorted(suffixes)})
    return Adapter(layers, dict(metadata or {}), other, extra)


def _layer(base: str, form: KeyFormat, tensors: Mapping[str, Tensor]) -> Layer:
    up, down = tensors[base + form.up], tensors[base + form.down]
    alpha = tensors.get(base + ALPHA)
    if alpha is not None and alpha.numel() != 1:
        raise ValueError(f"'{base}{ALPHA}' must be one number, but has the shape {tuple(alpha.shape)}.")
    if not (up.is_floating_point() and down.is_floating_point()):
        raise ValueError(f"Layer '{base}' holds {up.dtype} and {down.dtype}; a LoRA needs floating-point numbers.")
    try:
        return Layer(down, up, float(alpha.item()) if alpha is not None else float(down.shape[0]))
    except (ValueError, IndexError) as error:
        raise ValueError(f"Layer '{base}': {error}.") from error


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if not is_finite(tensor):
            raise ValueError(
                f"'{key}' holds NaN or infinity, so the LoRA would spoil every image."
                " Use another file, or train again with a lower learning rate."
            )
