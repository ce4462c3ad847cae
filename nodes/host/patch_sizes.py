"""Patches of a LoRA whose size is not that of the weight that they are for.

ComfyUI finds them while it draws, says so on the console, and draws on without them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.lora
import comfy.utils
import torch

_META = torch.device("meta")


def take_out_misfits(before: Any, after: Any) -> tuple[dict[str, str], int]:
    """Take the patches out of a ModelPatcher that ComfyUI could not apply.

    Args:
        before: the patcher without the LoRA; None stands for one without patches.
        after: its copy with the LoRA, which is changed.

    Returns:
        For each weight whose patches were taken out, what ComfyUI would say; and the number of weights that the LoRA
        patches.
    """
    misfits: dict[str, str] = {}
    count = 0
    for key, patches in list(after.patches.items()):
        old = len(before.patches.get(key, [])) if before is not None else 0
        if len(patches) == old:
            continue
        count += 1
        reason = _misfit(after.model, key, patches[old:])
        if reason:
            misfits[key] = reason
            after.patches[key] = patches[:old]
            if not old:
                del after.patches[key]
    return misfits, count


def _misfit(model: Any, key: str, patches: list[Any]) -> str:
    """Return why a weight's patches cannot be applied; "" if they can, or if that cannot be known."""
    weight = comfy.utils.get_attr(model, key)
    if not weight.is_floating_point():  # packed by a quantization, so that its shape is another one
        return ""
    # Tensors without memory go through ComfyUI's own computation, so that each kind is checked as it is applied.
    failures = _apply(patches, torch.empty(weight.shape, device=_META), key)
    if any("meta tensor" in failure for failure in failures):  # a kind that looks at values
        failures = _apply(patches, torch.zeros(weight.shape), key)
    if not failures:
        return ""
    told = re.sub(r"torch\.Size\((.*?)\)", r"\1", failures[0].split(f" {key} ", 1)[-1])
    return f"a weight of {' x '.join(map(str, weight.shape))}: {told}"


def _apply(patches: list[Any], weight: torch.Tensor, key: str) -> list[str]:
    """Apply patches to a weight of zeros or without memory, and return what ComfyUI says about it."""
    with _failures() as failures:
        try:
            comfy.lora.calculate_weight([_at_full_strength(patch) for patch in patches], weight, key)
        except Exception as error:  # what ComfyUI does not catch would end the prompt while it draws
            failures.append(str(error))
    return failures


def _at_full_strength(patch: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a patch at strength 1, since ComfyUI does not look at all patches of strength 0."""
    return (1.0, *patch[1:])


@contextmanager
def _failures() -> Iterator[list[str]]:
    """Collect what ComfyUI would log about patches that it cannot apply."""
    found: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        found.append(" ".join(record.getMessage().split()))
        return False

    root = logging.getLogger()
    root.addFilter(collect)
    try:
        yield found
    finally:
        root.removeFilter(collect)
