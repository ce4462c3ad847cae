"""The options node for validation on held-out images, early stopping and truncation."""

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
            node_id="ACLoRAValidationOptions",
            name="AC-LoRA Validation Options",
            description="Holds images out and measures the loss on them, for comparing settings and noticing "
            "overfitting. The lowest held-out loss comes too early for what is drawn, so a style learned this way "
            "stays weak.",
            inputs=_inputs(),
            search_aliases=["early stopping", "held-out images", "validation split", "overfitting"],
        )

    @classmethod
    def execute(cls, options: Options | None = None, **settings: Any) -> io.NodeOutput:
        return settings_output(options, settings)


def _inputs() -> list[Any]:
    return [
        io.Float.Input(
            "held_out",
            default=0.2,  # connecting this node means that validation is wanted
            min=0.0,
            max=0.5,
            step=0.05,
            tooltip="Fraction of the images held out for validation, if there are eight or more. The step with the "
            "lowest loss on them is given. 0 holds none out, as without this node.",
        ),
        io.Boolean.Input(
            "stop_early",
            default=TrainConfig.stop_early,
            tooltip="Early stopping: ends the training once the held-out loss has not improved for a while; without "
            "held-out images, once it fits its images well enough. Off: it takes all of its steps.",
        ),
        io.Boolean.Input(
            "refit",
            default=TrainConfig.refit,
            tooltip="With held-out images: once the best step is known, trains again up to it on all images.",
        ),
        io.Boolean.Input(
            "smallest",
            default=TrainConfig.smallest,
            tooltip="Truncates each layer to the ranks it uses, which hold 98 % of its energy; with held-out images, "
            "to the smallest that is as good on them. Off: the whole adapter.",
        ),
    ]
