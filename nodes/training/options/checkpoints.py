"""The options node for checkpoints."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

from comfy_api.latest import io

from ....aclora_core.config import CheckpointConfig, Resume
from ... import host
from .checkpoint_folder import resolve_checkpoint_folder
from .options import Options, options_schema


class ACLoRACheckpointOptions(io.ComfyNode):
    """AC-LoRA Checkpoint Options: saving and resuming a training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return options_schema(
            node_id="ACLoRACheckpointOptions",
            name="AC-LoRA Checkpoint Options",
            description="Saves the complete state of a training at intervals, so that it resumes after a crash or a "
            "cancel as if nothing had happened.",
            inputs=_inputs(),
            search_aliases=["resume training", "save state", "continue training", "crash"],
        )

    @classmethod
    def validate_inputs(cls, checkpoint_name: str | None = None) -> bool | str:
        # A linked input is not known yet.
        return True if checkpoint_name is None else host.refuse_by(lambda: resolve_checkpoint_folder(checkpoint_name))

    @classmethod
    def execute(
        cls,
        checkpoint_every: int,
        checkpoint_name: str,
        checkpoint_keep: int,
        resume: Resume,
        options: Options | None = None,
    ) -> io.NodeOutput:
        folder = resolve_checkpoint_folder(checkpoint_name)
        checkpoints = CheckpointConfig(folder, checkpoint_every, checkpoint_keep, resume)
        return io.NodeOutput(replace(options or Options(), checkpoints=checkpoints))


def _inputs() -> list[Any]:
    return [
        io.Int.Input(
            "checkpoint_every",
            default=CheckpointConfig.every,
            min=1,
            max=100_000,
            tooltip="Steps between two checkpoints. A smaller number loses fewer steps in a crash, but writes more "
            "often.",
        ),
        io.String.Input(
            "checkpoint_name",
            default="training",
            tooltip="A name for the checkpoints of this training: a folder in models/aclora_checkpoints. For a drive "
            "with more space, register a folder on it as aclora_checkpoints in extra_model_paths.yaml.",
        ),
        io.Int.Input(
            "checkpoint_keep",
            default=CheckpointConfig.keep,
            min=1,
            max=1000,
            tooltip="How many checkpoints are kept; older ones are deleted, except one from which a longer training "
            "can resume. At rank 32 each takes about 1.6 GB for SDXL, and 2.5 GB for Flux.1.",
        ),
        io.Combo.Input(
            "resume",
            options=list(get_args(Resume)),
            default=CheckpointConfig.resume,
            tooltip="Whether to resume from the last checkpoint of this name. never: starts over and replaces it. "
            "for more steps: resumes even if steps was raised.",
        ),
    ]
