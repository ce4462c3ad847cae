"""ComfyUI's LORA_MODEL: the tensors of a LoRA by key, with the metadata of the file that they come from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .adapter import Adapter
from .file_formats import is_diffusers_name
from .key_formats import ALPHA, KEY_FORMATS, diffusers_keys


class LoraStateDict(dict[str, Tensor]):
    """Tensors by key. ComfyUI and other nodes see a plain dict; ours find the metadata.

    Args:
        tensors: of the LoRA, by key.
        metadata: of the file that they come from; empty for a LoRA that was just trained.
        remarks: sentences for the user about that file.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, remarks: tuple[str, ...] = ()
    ) -> None:
        super().__init__(tensors)
        self.metadata = dict(metadata or {})
        self.remarks = remarks


def metadata_of(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the metadata that travels with the tensors; empty for a plain dict."""
    return state_dict.metadata if isinstance(state_dict, LoraStateDict) else {}


def remarks_on(state_dict: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the remarks that travel with the tensors; empty for a plain dict."""
    return state_dict.remarks if isinstance(state_dict, LoraStateDict) else ()


def to_state_dict(adapter: Adapter) -> LoraStateDict:
    """Return ComfyUI's LORA_MODEL: `<base>.lora_up.weight`, `.lora_down.weight` and `.alpha` per layer, and `extra`."""
    written = KEY_FORMATS[0]
    tensors: dict[str, Tensor] = {}
    for base, layer in adapter.layers.items():
        tensors[base + written.up] = layer.lora_up.contiguous()
        tensors[base + written.down] = layer.lora_down.contiguous()
        tensors[base + ALPHA] = torch.tensor(layer.alpha, dtype=torch.float32)
    tensors |= {key: tensor.contiguous() for key, tensor in adapter.extra.items()}
    return LoraStateDict(tensors, adapter.metadata)


def to_file_tensors(adapter: Adapter) -> LoraStateDict:
    """Return the tensors of a file: as to_state_dict, but with diffusers' keys where a layer has diffusers' name."""
    written = KEY_FORMATS[0]
    tensors = to_state_dict(adapter)
    for base, layer in adapter.layers.items():
        if is_diffusers_name(base) and layer.scale == 1.0:
            keys = diffusers_keys(base)
            tensors[base + keys.up] = tensors.pop(base + written.up)
            tensors[base + keys.down] = tensors.pop(base + written.down)
            del tensors[base + ALPHA]
    return tensors
