"""A LoRA applied to a model and a text encoder by ComfyUI's own loader."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.sd
import torch

log = logging.getLogger("aclora")


def apply_trained_lora(model: Any, clip: Any, state_dict: dict[str, torch.Tensor]) -> tuple[Any, Any]:
    """Apply a LoRA that was just trained, at strength 1.

    Returns:
        Copies of the MODEL and of the CLIP, if any; the inputs are not changed.
    """
    return comfy.sd.load_lora_for_models(model, clip, state_dict, 1.0, 1.0)


def apply_loaded_lora(
    lora_name: str,
    lora_model: dict[str, torch.Tensor],
    metadata: dict[str, str],
    model: Any,
    clip: Any,
    strength_model: float,
    strength_clip: float,
) -> tuple[Any, Any]:
    """Apply a LoRA that was loaded from a file or comes from another node. Keys that fit nothing are logged once.

    Args:
        lora_name: for messages.
        lora_model: the LoRA's tensors, by key.
        metadata: of the LoRA's file.
        model: a MODEL, or None.
        clip: a CLIP, or None.
        strength_model: of the LoRA on the model.
        strength_clip: of the LoRA on the text encoder.

    Returns:
        Copies of model and clip; the inputs are not changed.

    Raises:
        ValueError: no key fits.
    """
    with _unused_keys() as unused:
        changed = comfy.sd.load_lora_for_models(
            model, clip, lora_model, strength_model, strength_clip, lora_metadata=metadata or None
        )
    if len(unused) >= len(lora_model):
        base = metadata.get("ss_base_model_version", "unknown")
        origin = "" if base == "unknown" else f" It was trained on {base}."
        raise ValueError(
            f"None of the {len(lora_model)} keys of '{lora_name}' fits the connected model or clip; the first is"
            f" '{unused[0]}'."
            f"{origin} Connect the model that it was trained on, or choose another LoRA."
        )
    if unused:
        log.warning(
            "AC-LoRA: %d of the LoRA's %d keys fit neither model nor clip and were ignored; the first is '%s'.",
            len(unused),
            len(lora_model),
            unused[0],
        )
    return changed


@contextmanager
def _unused_keys() -> Iterator[list[str]]:
    """Collect the keys that ComfyUI cannot use, for each of which it would log a warning of its own."""
    keys: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        found = re.match(r"(?:lora key not loaded:|NOT LOADED) (.*)", record.getMessage())
        if found:
            keys.append(found[1])
        return found is None

    root = logging.getLogger()
    root.addFilter(collect)
    try:
        yield keys
    finally:
        root.removeFilter(collect)
