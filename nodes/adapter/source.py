"""Source of a LoRA for a node: a connection, or a file in models/loras where nothing is connected."""

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
    remark: str = ""  # a sentence on a choice that is not used


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
            tooltip=f"A LoRA file in models/loras to {verb}. Not used while lora_model is connected.",
        ),
    ]


def check_source(connected: bool, lora_name: str | None) -> bool | str:
    """Return True, or a sentence if no LoRA is given.

    Args:
        connected: whether lora_model is.
        lora_name: None for a link, whose text is not known yet and may be 'none'.
    """
    if connected or lora_name is None:
        return True
    if lora_name == NO_FILE:
        return "No LoRA is given: connect lora_model, or choose a file in lora_name."
    return check_lora_exists(str(lora_name))


def source_state(connected: bool, lora_name: str | None) -> str:
    """Return a text that changes whenever the file does that is used."""
    return "" if connected or lora_name in (None, NO_FILE) else file_state(str(lora_name))


def read_source(lora_model: dict[str, torch.Tensor] | None, lora_name: str) -> SourceLora:
    """Return the LoRA that is given.

    Raises:
        ValueError: none is given, or the file is damaged.
        FileNotFoundError: there is no such file.
    """
    problem = check_source(lora_model is not None, lora_name)
    if problem is not True:
        raise ValueError(problem)
    if lora_model is not None:
        ignored = f"'{shown(lora_name)}' is not used, as lora_model is connected." if lora_name != NO_FILE else ""
        return SourceLora(lora_model, "the connected LoRA", None, ignored)
    path = lora_path(lora_name)
    return SourceLora(read_lora(path), lora_name, path.stat().st_size)
