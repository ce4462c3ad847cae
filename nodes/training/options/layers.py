"""The options node for the choice of layers."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ....aclora_core.config import TrainConfig
from .options import Options, check_each, options_schema, settings_output


class ACLoRALayerOptions(io.ComfyNode):
    """AC-LoRA Layer Options: which layers are trained."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return options_schema(
            node_id="ACLoRALayerOptions",
            name="AC-LoRA Layer Options",
            description="Chooses by name which layers of the model are trained, and sets their maximum ranks.",
            inputs=_layers(),
            search_aliases=["layer filter", "block weights", "target modules", "only some layers", "rank per layer"],
        )

    @classmethod
    def execute(cls, options: Options | None = None, **settings: Any) -> io.NodeOutput:
        check_each(settings)
        return settings_output(options, settings)


def _layers() -> list[Any]:
    return [
        io.String.Input(
            "include_layers",
            default=TrainConfig.include_layers,
            multiline=True,
            tooltip="Trains only layers that match one of these lines: a part of the layer's name, such as "
            "double_blocks.7. or a regular expression. Empty: all layers that are chosen on the training node.",
        ),
        io.String.Input(
            "exclude_layers",
            default=TrainConfig.exclude_layers,
            multiline=True,
            tooltip="Layers that match one of these lines are not trained.",
        ),
        io.String.Input(
            "layer_ranks",
            default=TrainConfig.layer_ranks,
            multiline=True,
            tooltip="Lines such as attn=32: layers whose name matches get this maximum rank instead of max_rank. If "
            "several lines match a layer, the last one applies.",
        ),
    ]
