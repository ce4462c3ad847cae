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
            description="Keeps some images unseen, as validation images, and measures the loss on them, to compare "
            "settings and notice overfitting. The validation loss is lowest before the images look best, so a style "
            "trained this way stays weak.",
            inputs=_inputs(),
            search_aliases=[
                "early stopping",
                "held-out images",
                "validation images",
                "unseen images",
                "validation split",
                "overfitting",
            ],
        )

    @classmethod
    def execute(cls, options: Options | None = None, **settings: Any) -> io.NodeOutput:
        return settings_output(options, settings)


def _inputs() -> list[Any]:
    return [
        io.Float.Input(
            "held_out",
            display_name="validation_images",
            default=0.2,  # connecting this node means that validation is wanted
            min=0.0,
            max=0.5,
            step=0.05,
            tooltip="Fraction of the images kept unseen for validation, if there are eight or more. The step with the "
            "lowest validation loss is used. 0: none, as without this node.",
        ),
        io.Boolean.Input(
            "stop_early",
            default=TrainConfig.stop_early,
            tooltip="Early stopping: ends the training once the validation loss has stopped improving; without "
            "validation images, once the training images are learned well enough. Off: all steps are taken.",
        ),
        io.Boolean.Input(
            "refit",
            default=TrainConfig.refit,
            tooltip="With validation images: once the best step is known, trains again up to it on all images.",
        ),
        io.Boolean.Input(
            "smallest",
            default=TrainConfig.smallest,
            tooltip="Truncates each layer to the rank it uses, which holds 98 % of its energy (the sum of the squared "
            "singular values); with validation images, to the smallest size that is as good on them. Off: not "
            "truncated.",
        ),
    ]
