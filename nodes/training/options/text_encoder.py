"""The options node about text encoders that learn too."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from .options import Options, schema

if TYPE_CHECKING:
    from comfy.sd import CLIP


class ACLoRATextEncoderOptions(io.ComfyNode):
    """AC-LoRA Text Encoder Options: train the text encoder too."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ACLoRATextEncoderOptions",
            "AC-LoRA Text Encoder Options",
            "Has the text encoder learn too, so that a new word can come to mean the style.",
            _inputs(),
            ["train clip", "text encoder lora", "te learning rate", "trigger word"],
        )

    @classmethod
    def execute(cls, clip: CLIP, text_learning: float, options: Options | None = None) -> io.NodeOutput:
        with_learning = (options or Options()).with_settings({"text_learning": text_learning})
        return io.NodeOutput(replace(with_learning, clip=clip))


def _inputs() -> list[Any]:
    return [
        io.Clip.Input(
            "clip",
            tooltip="The text encoder that the dataset node has as well; of SD1.5, SD2.1 or SDXL. It stays as it is; "
            "the training node gives a copy that has learned.",
        ),
        io.Float.Input(
            "text_learning",
            default=0.2,
            min=0.01,
            max=10.0,
            step=0.05,
            tooltip="How fast it learns, compared with the model. Larger ties the style more to its words, and words "
            "forget more of what they meant.",
        ),
    ]
