"""The options node about memory and speed."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ....aclora_core.config import TrainConfig
from .options import Options, schema, settings_node


class ACLoRASpeedOptions(io.ComfyNode):
    """AC-LoRA Speed Options: CUDA graphs and activation checkpointing."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ACLoRASpeedOptions",
            "AC-LoRA Speed Options",
            "Memory against speed. Nothing here changes what is learned.",
            _inputs(),
            ["gradient checkpointing", "low vram training", "cuda graph"],
        )

    @classmethod
    def execute(cls, options: Options | None = None, **settings: Any) -> io.NodeOutput:
        return settings_node(options, settings)


def _inputs() -> list[Any]:
    return [
        io.Combo.Input(
            "checkpointing",
            options=["automatic", "all", "off"],
            default=TrainConfig.checkpointing,
            tooltip="Computes parts of the model twice instead of keeping them, which needs less memory and a third "
            "more time. automatic: as many parts as it takes for a step to fit, and then fewer pictures at a time.",
        ),
        io.Boolean.Input(
            "graph",
            default=TrainConfig.graph,
            tooltip="Records the steps as CUDA graphs, which is several times faster. Off only to look for a fault.",
        ),
    ]
