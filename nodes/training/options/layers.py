"""The options node about which layers learn."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ....aclora_core.config import TrainConfig
from .options import Options, check_settings, schema, settings_node


class ACLoRALayerOptions(io.ComfyNode):
    """AC-LoRA Layer Options: which layers are trained."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ACLoRALayerOptions",
            "AC-LoRA Layer Options",
            "Which of a model's layers learn, by their names, and how much each may learn.",
            _layers(),
            ["layer filter", "block weights", "target modules", "only some layers", "rank per layer"],
        )

    @classmethod
    def validate_inputs(
        cls, include_layers: str | None = None, exclude_layers: str | None = None, layer_ranks: str | None = None
    ) -> bool | str:
        return check_settings(include_layers=include_layers, exclude_layers=exclude_layers, layer_ranks=layer_ranks)

    @classmethod
    def execute(cls, options: Options | None = None, **settings: Any) -> io.NodeOutput:
        return settings_node(options, settings)


def _layers() -> list[Any]:
    return [
        io.String.Input(
            "include_layers",
            default=TrainConfig.include_layers,
            multiline=True,
            tooltip="Of the layers that the training node chooses only those with one of these lines in their name: a "
            "part of the name, such as double_blocks.7. or a regular expression. Empty takes all.",
        ),
        io.String.Input(
            "exclude_layers",
            default=TrainConfig.exclude_layers,
            multiline=True,
            tooltip="And none of the layers with one of these lines in their name.",
        ),
        io.String.Input(
            "layer_ranks",
            default=TrainConfig.layer_ranks,
            multiline=True,
            tooltip="Lines such as attn=32: layers with this in their name get this maximum rank instead of max_rank. "
            "Of several lines for a layer the last counts.",
        ),
    ]
