"""The options node about the pictures set aside, which tell the best step and the smallest size."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ....aclora_core.config import TrainConfig
from .options import Options, schema, settings_node


class ACLoRAValidationOptions(io.ComfyNode):
    """AC-LoRA Validation Options: held-out images and what follows from them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ACLoRAValidationOptions",
            "AC-LoRA Validation Options",
            "How a training finds its best step and smallest size by pictures that it sets aside.",
            _inputs(),
            ["early stopping", "held-out pictures", "validation split", "overfitting"],
        )

    @classmethod
    def execute(cls, options: Options | None = None, **settings: Any) -> io.NodeOutput:
        return settings_node(options, settings)


def _inputs() -> list[Any]:
    return [
        io.Float.Input(
            "held_out",
            default=TrainConfig.held_out,
            min=0.0,
            max=0.5,
            step=0.05,
            tooltip="Share of the pictures that are set aside, from eight pictures on, to see which step is best. "
            "0 learns from all and takes the last step.",
        ),
        io.Boolean.Input(
            "stop_early",
            default=TrainConfig.stop_early,
            tooltip="Stops when the pictures set aside have only got worse for a while.",
        ),
        io.Boolean.Input(
            "refit",
            default=TrainConfig.refit,
            tooltip="Once the best step is known, trains again up to it with all pictures, those set aside too.",
        ),
        io.Boolean.Input(
            "smallest",
            default=TrainConfig.smallest,
            tooltip="Gives the smallest adapter that is as good as the whole one, by the pictures set aside.",
        ),
    ]
