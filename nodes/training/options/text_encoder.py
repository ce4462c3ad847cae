"""The options node for training the text encoder."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from .options import Options, options_schema

if TYPE_CHECKING:
    from comfy.sd import CLIP


class ACLoRATextEncoderOptions(io.ComfyNode):
    """AC-LoRA Text Encoder Options: train the text encoder too."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return options_schema(
            node_id="ACLoRATextEncoderOptions",
            name="AC-LoRA Text Encoder Options",
            description="Trains the text encoder too, so that a new word can come to mean the style.",
            inputs=_inputs(),
            search_aliases=["train clip", "text encoder lora", "te learning rate", "trigger word"],
        )

    @classmethod
    def execute(cls, clip: CLIP, text_learning: float, options: Options | None = None) -> io.NodeOutput:
        changed = (options or Options()).with_settings({"text_learning": text_learning})
        return io.NodeOutput(replace(changed, clip=clip))


def _inputs() -> list[Any]:
    return [
        io.Clip.Input(
            "clip",
            tooltip="The text encoder that is also connected to the dataset node; of SD1.5, SD2.1 or SDXL. It is not "
            "changed; the training node returns a trained copy.",
        ),
        io.Float.Input(
            "text_learning",
            default=0.2,
            min=0.01,
            max=10.0,
            step=0.05,
            tooltip="Learning rate of the text encoder relative to the model's. A larger value ties the style more "
            "closely to its words, and words lose more of their meaning.",
        ),
    ]
