"""Parts of a LoRA file that change nothing in ComfyUI, and why."""

from __future__ import annotations

import re
from collections.abc import Mapping

STRAY_ALPHA = "alpha without matrices"
STRAY_PART = "part of a layer without matrices"
HALF_PAIR = "half a pair, as lora_up or lora_down is missing"
INCOMPLETE_LAYER = "incomplete layer"
SECOND_SPELLING = "duplicate of a layer under another name"
RANK_0 = "layer of rank 0, which changes nothing"
UNFIT_PAIR = "layer whose lora_up and lora_down do not fit together"
UNFIT_ALPHA = "layer whose alpha is not one number"
NO_FLOATS = "layer whose type is not floating-point"
MAGNITUDES = "DoRA magnitudes as PEFT stores them, without which the layer is not what was trained"
UNKNOWN = "key that ComfyUI does not know"

# Keys that are kept in the file, as other programs use them. The first pattern that is found counts.
_FOREIGN_KEYS = (
    (re.compile(r"\.lora_magnitude_vector(\..+)?$"), MAGNITUDES),
    (re.compile(r"\.lora_(A|B|up|down)(\.[^.]+)?\.bias$"), "bias of a LoRA's matrix (PEFT's lora_bias)"),
    (re.compile(r"\.scalar$"), "scalar of a layer (LyCORIS' use_scalar)"),
    (re.compile(r"^bundle_emb\."), "bundled embedding, which ComfyUI reads from models/embeddings only"),
    (re.compile(r"\.lora_embedding_(A|B)(\..+)?$"), "LoRA of an embedding table"),
    (re.compile(r"\.lora_(A|B)\.[^.]+(\.weight)?$"), "layer of another LoRA in the same file"),
)


class UnusableLayerError(ValueError):
    """A layer that cannot be used. `reason` sums it up for several layers; the message names the key."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def reason_of_key(key: str) -> str:
    """Return why a key that belongs to no layer changes nothing."""
    return next((reason for pattern, reason in _FOREIGN_KEYS if pattern.search(key)), UNKNOWN)


def left_out_lines(left_out: Mapping[str, str]) -> list[str]:
    """Return a line for each reason: how many parts it concerns, and the first of them.

    Args:
        left_out: key or base name -> reason (Adapter.left_out).
    """
    by_reason: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        by_reason.setdefault(reason, []).append(name)
    return [f"{len(names)} x {reason}: '{names[0]}'{_more(names)}" for reason, names in by_reason.items()]


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
