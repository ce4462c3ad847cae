"""The options node for memory, speed and several GPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

from comfy_api.latest import io

from ....aclora_core.config import Checkpointing, TrainConfig
from ... import host
from ..several.count import CHOICES, process_count
from .options import Options, options_schema, settings_output


class ACLoRASpeedOptions(io.ComfyNode):
    """AC-LoRA Speed Options: CUDA graphs, activation checkpointing, and several GPUs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return options_schema(
            node_id="ACLoRASpeedOptions",
            name="AC-LoRA Speed Options",
            description="Trades memory for speed, and uses several GPUs.",
            inputs=_inputs(),
            search_aliases=["gradient checkpointing", "low vram training", "cuda graph", "multi gpu", "several gpus"],
        )

    @classmethod
    def validate_inputs(cls, gpus: Any = None) -> bool | str:
        # A linked input is not known yet.
        return True if gpus is None else host.refuse_by(lambda: process_count(gpus))

    @classmethod
    def execute(cls, options: Options | None = None, gpus: str = "1", **settings: Any) -> io.NodeOutput:
        return settings_output(replace(options or Options(), gpus=gpus), settings)


def _inputs() -> list[Any]:
    return [
        io.Combo.Input(
            "checkpointing",
            options=list(get_args(Checkpointing)),
            default=TrainConfig.checkpointing,
            tooltip="Gradient checkpointing: saves memory by computing blocks of the model again in the backward "
            "pass, which takes about a third more time. automatic: as many blocks as a step needs to fit, then fewer "
            "images at a time. A model that does not fit is streamed from main memory (RAM) in any case.",
        ),
        io.Boolean.Input(
            "graph",
            default=TrainConfig.graph,
            tooltip="Captures steps as CUDA graphs, which is several times faster. Switch it off only to track down a "
            "problem.",
        ),
        io.Float.Input(
            "gpu_memory",
            default=TrainConfig.gpu_memory,
            min=0.0,
            max=1024.0,
            step=0.5,
            optional=True,
            tooltip="GPU memory in GB that ComfyUI may use while it trains; 0: all that is free. Where it is short, "
            "training uses gradient checkpointing and streams weights from main memory, which is slower.",
        ),
        io.Combo.Input(
            "gpus",
            options=CHOICES,
            default="1",
            optional=True,
            tooltip="How many GPUs of this machine train together. Each takes batch_size images of a step, so two GPUs "
            "with batch size 2 train what one trains with batch size 4. Each loads the model for itself. Without a "
            "GPU the number is that of processes on the CPU, which is slow and serves to try it.",
        ),
    ]
