"""The two ways to hand a LoRA to a node: a connection, or a file in models/loras."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..aclora_core import tensor_file
from . import lora_folder

CONNECTED = "(connected LoRA)"


def lora_inputs() -> list[Any]:
    """lora_model and lora_name, of which a user sets one."""
    return [
        io.LoraModel.Input(
            "lora_model", optional=True, tooltip="A LoRA from Train AC-LoRA or Load AC-LoRA. Or choose a file below."
        ),
        io.Combo.Input(
            "lora_name",
            options=[CONNECTED, *lora_folder.names()],
            default=CONNECTED,
            tooltip=f"A file in models/loras. Leave it at '{CONNECTED}' where a LoRA is connected.",
        ),
    ]


def check_choice(lora_name: str | None, connected: bool) -> bool | str:
    """Whether exactly one was set, as validate_inputs says it; a name of None is a link, not known before the run."""
    if lora_name is None:
        return True
    if connected and lora_name != CONNECTED:
        return f"A LoRA is connected, and '{lora_name}' is chosen too. Set lora_name to '{CONNECTED}', or disconnect."
    if not connected and lora_name == CONNECTED:
        return "There is no LoRA. Connect one to lora_model, or choose a file in lora_name."
    if not connected and not lora_folder.exists(lora_name):
        return f"There is no LoRA file '{lora_name}' in models/loras. Choose another; the key R reads the list again."
    return True


def fingerprint(lora_name: str | None) -> str:
    """Changes when the file does, so that the node runs again."""
    if lora_name is None or lora_name == CONNECTED:
        return ""
    state = lora_folder.path_of(lora_name).stat()
    return f"{state.st_mtime_ns} {state.st_size}"


def read(lora_name: str, lora_model: dict[str, Tensor] | None) -> tuple[dict[str, Tensor], dict[str, str], str, Any]:
    """Tensors, metadata, a name for messages, and the bytes of the file (None where there is none).

    Raises:
        ValueError: none or both are set, or the file is no LoRA.
    """
    choice = check_choice(lora_name, lora_model is not None)
    if choice is not True:
        raise ValueError(choice)
    if lora_model is not None:
        return lora_model, {}, "The connected LoRA", None
    path = lora_folder.path_of(lora_name)
    state_dict, metadata = tensor_file.read(path)
    return state_dict, metadata, lora_name, path.stat().st_size
