"""The inputs of the training node that are about checkpoints."""

from __future__ import annotations

from typing import Any, get_args

from comfy_api.latest import io

from ..aclora_core.checkpoint import Checkpoints, Resume
from . import checkpoint_folder

_DEFAULTS: dict[str, Any] = {
    "checkpoint_every": 0,
    "checkpoint_name": "training",
    "checkpoint_keep": Checkpoints.keep,
    "resume": Checkpoints.resume,
}


def inputs() -> list[Any]:
    """Optional, so that graphs from before they came still run."""
    return [
        io.Int.Input(
            "checkpoint_every", default=_DEFAULTS["checkpoint_every"], min=0, max=100_000, optional=True, advanced=True,
            tooltip="Steps between two checkpoints, from which training goes on after a crash or a cancel. 0 writes "
            "none. 50 suits a training of an hour.",
        ),
        io.String.Input(
            "checkpoint_name", default=_DEFAULTS["checkpoint_name"], optional=True, advanced=True,
            tooltip="A name for the checkpoints of this training: a folder in models/aclora_checkpoints.",
        ),
        io.Int.Input(
            "checkpoint_keep", default=_DEFAULTS["checkpoint_keep"], min=1, max=1000, optional=True, advanced=True,
            tooltip="How many checkpoints are kept; older ones are deleted. Each takes about five times the adapter.",
        ),
        io.Combo.Input(
            "resume", options=list(get_args(Resume)), default=_DEFAULTS["resume"], optional=True, advanced=True,
            tooltip="Whether to go on from the last checkpoint of this name. never: starts anew, and replaces it. "
            "for more steps: goes on also where steps was raised.",
        ),
    ]  # fmt: skip


def take(values: dict[str, Any]) -> tuple[Checkpoints | None, str]:
    """Takes these inputs out of the values of all: what they ask for, and the name; None where they are off."""
    every, name, keep, resume = (values.pop(key, default) for key, default in _DEFAULTS.items())
    return (Checkpoints(checkpoint_folder.folder_of(name), every, keep, resume) if every else None), name


def state(settings: dict[str, list]) -> int:
    """Changes when a training that can go on was cancelled: what it gave then is not its end."""
    values = {key: settings.get(key, [default])[0] for key, default in _DEFAULTS.items()}
    asks = values["checkpoint_every"] != 0 and values["resume"] != "never"
    return checkpoint_folder.cancels(str(values["checkpoint_name"])) if asks else 0


def check_name(given: list | None) -> bool | str:
    """True, or a sentence about the name of the checkpoints; a linked one is not known yet."""
    try:
        if given and given[0] is not None:
            checkpoint_folder.folder_of(given[0])
    except ValueError as error:
        return str(error)
    return True
