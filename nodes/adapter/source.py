"""Source of a LoRA for a node: a connection, or a file in models/loras."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io

from ...aclora_core.adapter import read_lora
from ..paths import shown
from .files import check_lora_exists, file_state, lora_names, lora_path

NO_FILE = "none"  # the choice of no file


@dataclass(frozen=True)
class SourceLora:
    """A LoRA that is given to a node."""

    tensors: dict[str, torch.Tensor]  # its metadata travels with them (LoraStateDict)
    name: str
    size: int | None  # bytes of the file; None for a connected LoRA


def source_inputs(verb: str) -> list[Any]:
    """Return the two inputs of which one gives the LoRA. verb: of the tooltips, such as "inspect"."""
    return [
        io.LoraModel.Input(
            "lora_model", optional=True, tooltip=f"The LoRA to {verb}, from Train or Load AC-LoRA or another node."
        ),
        io.Combo.Input(
            "lora_name",
            options=[NO_FILE, *lora_names()],
            default=NO_FILE,
            tooltip=f"A LoRA file in models/loras to {verb}. Choose '{NO_FILE}' where lora_model is connected.",
        ),
    ]


def check_source(connected: bool, lora_name: str | None) -> bool | str:
    """Return True, or a sentence unless exactly one LoRA is given.

    Args:
        connected: whether lora_model is.
        lora_name: None for a link, whose text is not known yet and may be 'none'.
    """
    chosen = lora_name not in (None, NO_FILE)
    if connected and chosen:
        advice = f"set lora_name to '{NO_FILE}', or disconnect lora_model"
        return f"Two LoRAs are given: {advice}. lora_name is '{shown(lora_name)}'."
    if not connected and lora_name == NO_FILE:
        return "No LoRA is given: connect lora_model, or choose a file in lora_name."
    if chosen:
        return check_lora_exists(str(lora_name))
    return True


def source_state(lora_name: str | None) -> str:
    """Return a text that changes whenever the chosen file does."""
    return "" if lora_name in (None, NO_FILE) else file_state(str(lora_name))


def read_source(lora_model: dict[str, torch.Tensor] | None, lora_name: str) -> SourceLora:
    """Return the LoRA that is given.

    Raises:
        ValueError: not exactly one is given, or the file is damaged.
        FileNotFoundError: there is no such file.
    """
    problem = check_source(lora_model is not None, lora_name)
    if problem is not True:
        raise ValueError(problem)
    if lora_model is not None:
        return SourceLora(lora_model, "the connected LoRA", None)
    path = lora_path(lora_name)
    return SourceLora(read_lora(path), lora_name, path.stat().st_size)
