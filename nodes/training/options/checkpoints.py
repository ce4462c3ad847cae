"""The options node about checkpoints, and where they lie."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

from comfy_api.latest import io

from ....aclora_core.config import CheckpointConfig, Resume
from . import checkpoint_folder
from .options import Options, schema


class ACLoRACheckpointOptions(io.ComfyNode):
    """AC-LoRA Checkpoint Options: saving and resuming a training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ACLoRACheckpointOptions",
            "AC-LoRA Checkpoint Options",
            "Writes down now and then all that a training knows, so that it goes on after a crash or a cancel as if "
            "nothing had happened.",
            _inputs(),
            ["resume training", "save state", "continue training", "crash"],
        )

    @classmethod
    def validate_inputs(cls, checkpoint_name: str | None = None) -> bool | str:
        try:
            if checkpoint_name is not None:  # a linked one is not known yet
                checkpoint_folder.folder_of(checkpoint_name)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, checkpoint_name: str | None = None, resume: str | None = None, **others: Any) -> int:
        """Changes when a training that can go on was cancelled: what it gave then is not its end."""
        known = checkpoint_name is not None and resume != "never"
        return checkpoint_folder.cancels(checkpoint_folder.folder_of(str(checkpoint_name))) if known else 0

    @classmethod
    def execute(
        cls,
        checkpoint_every: int,
        checkpoint_name: str,
        checkpoint_keep: int,
        resume: Resume,
        options: Options | None = None,
    ) -> io.NodeOutput:
        folder = checkpoint_folder.folder_of(checkpoint_name)
        checkpoints = CheckpointConfig(folder, checkpoint_every, checkpoint_keep, resume)
        return io.NodeOutput(replace(options or Options(), checkpoints=checkpoints))


def _inputs() -> list[Any]:
    return [
        io.Int.Input(
            "checkpoint_every",
            default=50,
            min=1,
            max=100_000,
            tooltip="Steps between two checkpoints, from which training goes on after a crash or a cancel. Smaller "
            "loses less and writes more often.",
        ),
        io.String.Input(
            "checkpoint_name",
            default="training",
            tooltip="A name for the checkpoints of this training: a folder in models/aclora_checkpoints. Or the whole "
            "path of a folder of your own, such as D:/checkpoints/ink, for a drive with more room.",
        ),
        io.Int.Input(
            "checkpoint_keep",
            default=CheckpointConfig.keep,
            min=1,
            max=1000,
            tooltip="How many checkpoints are kept, and besides them the end of the first pass, which more steps go on "
            "from; older ones are deleted. Each takes about five times the adapter.",
        ),
        io.Combo.Input(
            "resume",
            options=list(get_args(Resume)),
            default=CheckpointConfig.resume,
            tooltip="Whether to go on from the last checkpoint of this name. never: starts anew, and replaces it. "
            "for more steps: goes on also where steps was raised.",
        ),
    ]
