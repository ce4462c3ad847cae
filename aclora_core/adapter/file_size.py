"""The size of the file as which an adapter is saved, known before it is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from ..storage import safetensors_size
from .adapter import Adapter, Layer
from .file_formats import in_format, part_counts
from .lora_file import file_metadata
from .metadata import build_metadata
from .names import base_model_of
from .state_dict import to_file_tensors


def file_size(
    adapter: Adapter, metadata: Mapping[str, str] | None = None, dtype: torch.dtype | None = torch.float16
) -> int:
    """Return the bytes of the file as which Save AC-LoRA saves an adapter by default, without a preview.

    Args:
        metadata: of the file; that which build_metadata makes if None.
        dtype: of the factors; None for the type they have.
    """
    if metadata is None:
        metadata = build_metadata(adapter, "")
    outline = _outline(adapter, dtype)
    written, _ = in_format(outline, "automatic", base_model_of(metadata, (*adapter.layers, *adapter.other)))
    return safetensors_size(to_file_tensors(written), file_metadata(written, metadata))


def component_sizes(adapter: Adapter, dtype: torch.dtype | None = torch.float16) -> dict[str, int]:
    """Return the bytes that one component of each layer takes in that file."""
    parts = part_counts(_outline(adapter, dtype))
    return {
        base: (layer.lora_down[0].numel() * parts[base] + layer.lora_up.shape[0])
        * (dtype or layer.lora_down.dtype).itemsize
        for base, layer in adapter.layers.items()
    }


def _outline(adapter: Adapter, dtype: torch.dtype | None) -> Adapter:
    """Return an adapter of the same shapes without numbers."""
    layers = {
        base: Layer(
            layer.lora_down.to("meta", dtype or layer.lora_down.dtype),
            layer.lora_up.to("meta", dtype or layer.lora_up.dtype),
            layer.alpha,
        )
        for base, layer in adapter.layers.items()
    }
    return replace(adapter, layers=layers)
