"""The options node for validation on held-out images, which finds the best step and the smallest size."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ....aclora_core.config import TrainConfig
from .options import Options, options_schema, settings_output


class ACLoRAValidationOptions(io.ComfyNode):
    """AC-LoRA Validation Options: held-out images and what follows from them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return options_schema(
            "ACLoRAValidationOptions",
            "AC-LoRA Validation Options",
            "How a training finds its best step and smallest size with held-out images.",
            _inputs(),
            ["early stopping", "held-out images", "validation split", "overfitting"],
        )

    @classmethod
    def execute(cls, options: Options | None = None, **settings: Any) -> io.NodeOutput:
        return settings_output(options, settings)


def _inputs() -> list[Any]:
    return [
        io.Float.Input(
            "held_out",
            default=TrainConfig.held_out,
            min=0.0,
            max=0.5,
            step=0.05,
            tooltip="Fraction of the images held out for validation, if there are eight or more, to find the best "
            "step. 0 trains on all images and takes the last step.",
        ),
        io.Boolean.Input(
            "stop_early",
            default=TrainConfig.stop_early,
            tooltip="Early stopping: ends the training once the held-out loss has not improved for a while.",
        ),
        io.Boolean.Input(
            "refit",
            default=TrainConfig.refit,
            tooltip="Once the best step is known, trains again up to it on all images, the held-out ones too.",
        ),
        io.Boolean.Input(
            "smallest",
            default=TrainConfig.smallest,
            tooltip="Returns the smallest truncation of the adapter that is as good as the whole on the held-out "
            "images.",
        ),
    ]
