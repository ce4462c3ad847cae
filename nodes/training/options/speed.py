"""The options node for memory and speed."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ....aclora_core.config import TrainConfig
from .options import Options, options_schema, settings_output


class ACLoRASpeedOptions(io.ComfyNode):
    """AC-LoRA Speed Options: CUDA graphs and activation checkpointing."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return options_schema(
            node_id="ACLoRASpeedOptions",
            name="AC-LoRA Speed Options",
            description="Trades memory for speed. Nothing here changes the trained style.",
            inputs=_inputs(),
            search_aliases=["gradient checkpointing", "low vram training", "cuda graph"],
        )

    @classmethod
    def execute(cls, options: Options | None = None, **settings: Any) -> io.NodeOutput:
        return settings_output(options, settings)


def _inputs() -> list[Any]:
    return [
        io.Combo.Input(
            "checkpointing",
            options=["automatic", "all", "off"],
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
    ]
