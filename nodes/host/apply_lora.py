"""Puts a LoRA on a model and a text encoder with ComfyUI's own loader, and says in one sentence what did not fit."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.sd
import torch

logger = logging.getLogger("aclora")


def with_adapter(model: Any, clip: Any, state_dict: dict[str, torch.Tensor]) -> tuple[Any, Any]:
    """Return copies of a MODEL and of a CLIP, if any, with a LoRA on them at strength 1; both stay as they are."""
    return comfy.sd.load_lora_for_models(model, clip, state_dict, 1.0, 1.0)


def applied(
    lora_name: str,
    lora_model: dict[str, torch.Tensor],
    metadata: dict[str, str],
    model: Any,
    clip: Any,
    strength_model: float,
    strength_clip: float,
) -> tuple[Any, Any]:
    """Copies of model and clip with the LoRA; one sentence in the log on the keys that fit neither."""
    with _unused_keys() as unused:
        changed = comfy.sd.load_lora_for_models(
            model, clip, lora_model, strength_model, strength_clip, lora_metadata=metadata or None
        )
    if len(unused) >= len(lora_model):
        base = metadata.get("ss_base_model_version", "unknown")
        origin = "" if base == "unknown" else f" It was made for {base}."
        raise ValueError(
            f"None of the {len(lora_model)} keys of '{lora_name}' fits what is connected; the first is '{unused[0]}'."
            f"{origin} Connect the model that it was made for, or choose another LoRA."
        )
    if unused:
        logger.warning(
            "AC-LoRA: %d of the LoRA's %d keys fit nothing that is connected and were left out, the first is '%s'.",
            len(unused),
            len(lora_model),
            unused[0],
        )
    return changed


@contextmanager
def _unused_keys() -> Iterator[list[str]]:
    """Collects the keys for which the host would write a warning each, a thousand lines for one wrong file."""
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
