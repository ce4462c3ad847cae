"""The two ways to hand a LoRA to a node: a connection, or a file in models/loras."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io

from ...aclora_core.storage import read_safetensors
from . import files as lora_folder

NONE = "none"  # the choice of no file


@dataclass(frozen=True)
class Lora:
    """A LoRA as it came in."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]
    name: str
    size: int | None  # bytes of the file, if it is one


def sources(verb: str) -> list[Any]:
    """The two inputs of which one gives the LoRA."""
    return [
        io.LoraModel.Input(
            "lora_model", optional=True, tooltip=f"The LoRA to {verb}, from Train or Load AC-LoRA or another node."
        ),
        io.Combo.Input(
            "lora_name",
            options=[NONE, *lora_folder.names()],
            default=NONE,
            tooltip=f"A LoRA file in models/loras to {verb}. Choose '{NONE}' where lora_model is connected.",
        ),
    ]


def check_source(connected: bool, lora_name: str | None) -> bool | str:
    """True, or a sentence where not exactly one LoRA is given; lora_name is None for a link, which may give 'none'."""
    chosen = lora_name not in (None, NONE)
    if connected and chosen:
        return f"Two LoRAs are given: set lora_name to '{NONE}', or disconnect lora_model. lora_name is '{lora_name}'."
    if not connected and lora_name == NONE:
        return "No LoRA is given: connect lora_model, or choose a file in lora_name."
    if chosen:
        return lora_folder.check_exists(str(lora_name))
    return True


def file_state(lora_name: str | None) -> str:
    """Changes whenever the chosen file does."""
    return "" if lora_name in (None, NONE) else lora_folder.state_of(str(lora_name))


def read(lora_model: dict[str, torch.Tensor] | None, lora_name: str) -> Lora:
    problem = check_source(lora_model is not None, lora_name)
    if problem is not True:
        raise ValueError(problem)
    if lora_model is not None:
        return Lora(lora_model, {}, "the connected LoRA", None)
    path = lora_folder.path_of(lora_name)
    return Lora(*read_safetensors(path), lora_name, path.stat().st_size)
