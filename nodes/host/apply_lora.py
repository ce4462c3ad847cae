"""A LoRA applied to a model and a text encoder by ComfyUI's own loader."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.sd
import torch

from .patch_sizes import take_out_misfits

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
    left_out: Collection[str] = (),
) -> tuple[Any, Any, list[str]]:
    """Apply a LoRA that was loaded from a file or comes from another node. What does not fit is logged, too.

    Args:
        lora_name: for messages.
        lora_model: the LoRA's tensors, by key.
        metadata: of the LoRA's file.
        model: a MODEL, or None.
        clip: a CLIP, or None.
        strength_model: of the LoRA on the model.
        strength_clip: of the LoRA on the text encoder.
        left_out: keys of which the user is told elsewhere that ComfyUI does not use them.

    Returns:
        Copies of model and clip, and sentences on what does not fit; the inputs are not changed.

    Raises:
        ValueError: nothing fits, by its name or by its size.
    """
    with _unused_keys() as unused:
        new_model, new_clip = comfy.sd.load_lora_for_models(
            model, clip, lora_model, strength_model, strength_clip, lora_metadata=metadata or None
        )
    if len(unused) >= len(lora_model):
        raise ValueError(
            f"None of the {len(lora_model)} keys of '{lora_name}' fits the connected model or clip; the first is"
            f" '{unused[0]}'.{_advice(metadata)}"
        )
    problems = []
    if unexpected := [key for key in unused if key not in left_out]:
        problems.append(
            f"{len(unexpected)} of the LoRA's {len(lora_model)} keys fit neither model nor clip and were ignored; the"
            f" first is '{unexpected[0]}'."
        )
    patchers = [(model, new_model), (clip and clip.patcher, new_clip and new_clip.patcher)]
    found = [take_out_misfits(before, after) for before, after in patchers if after is not None]
    misfits = {key: reason for each, _ in found for key, reason in each.items()}
    if misfits:
        count, (key, reason) = sum(number for _, number in found), next(iter(misfits.items()))
        first = f"the first is '{key}' ({reason})."
        if len(misfits) == count:
            raise ValueError(
                f"None of the {count} layers of '{lora_name}' fits by its size, though the names do: {first}"
                f"{_advice(metadata)}"
            )
        problems.append(
            f"{len(misfits)} of the LoRA's {count} layers ignored, as only the name fits and not the size; {first}"
        )
    for problem in problems:
        log.warning("AC-LoRA: %s", problem)
    return new_model, new_clip, problems


def _advice(metadata: dict[str, str]) -> str:
    base = metadata.get("ss_base_model_version", "unknown")
    origin = "" if base == "unknown" else f" It was trained on {base}."
    return f"{origin} Connect the model that it was trained on, or choose another LoRA."


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
