"""The options node for previews: images sampled while a training runs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ... import host
from ...texts import check_text
from .options import Options, PreviewSettings, options_schema

if TYPE_CHECKING:
    from comfy.sd import CLIP, VAE

_MAX_PROMPTS = 8


class ACLoRAPreviewOptions(io.ComfyNode):
    """AC-LoRA Preview Options: images drawn while a training runs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return options_schema(
            node_id="ACLoRAPreviewOptions",
            name="AC-LoRA Preview Options",
            description="Draws sample images during the training, shows them on the training node, and keeps them as "
            "files, with a contact sheet of all steps.",
            inputs=_inputs(),
            search_aliases=["sample prompts", "live preview", "sample images", "training samples"],
        )

    @classmethod
    def validate_inputs(cls, preview_prompts: str | None = None) -> bool | str:
        # Only this one is named, since ComfyUI repeats the sentence at every named input.
        if not preview_prompts or not preview_prompts.strip():  # none is no fault where previews are off
            return True
        return host.refuse_by(lambda: _prompts(preview_prompts))

    @classmethod
    def execute(
        cls,
        preview_every: int,
        preview_prompts: str,
        preview_guidance: float,
        clip: CLIP,
        vae: VAE | None = None,
        options: Options | None = None,
        previews: bool = True,
        preview_share: float = 0.2,
    ) -> io.NodeOutput:
        options = options or Options()
        if not previews:
            return io.NodeOutput(options)
        # Encoded before the training, so that the text encoder needs no memory during it.
        prompts = _prompts(preview_prompts)
        conditionings = host.encode_prompts(clip, prompts)
        settings = PreviewSettings(preview_every, preview_share, prompts, conditionings, preview_guidance, vae)
        return io.NodeOutput(replace(options, previews=settings))


def _prompts(text: str) -> list[str]:
    """Split the text into prompts. Raises ValueError if there are none or too many, or one cannot be encoded."""
    check_text("preview_prompts", text)
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError("There is nothing to preview. Write prompts into preview_prompts, one per line.")
    if len(prompts) > _MAX_PROMPTS:
        raise ValueError(
            f"preview_prompts has {len(prompts)} lines, but at most {_MAX_PROMPTS} are allowed. Remove some."
        )
    return prompts


def _inputs() -> list[Any]:
    return [
        io.Int.Input(
            "preview_every",
            default=50,
            min=1,
            max=100_000,
            tooltip="Steps between two sets of preview images. Each image takes about as long as 5 to 10 training "
            "steps. A set is also drawn for each step that Train AC-LoRA keeps to choose from.",
        ),
        io.String.Input(
            "preview_prompts",
            default="",
            multiline=True,
            tooltip=f"What the previews show: one prompt per line, at most {_MAX_PROMPTS}.",
        ),
        io.Float.Input(
            "preview_guidance",
            default=4.0,
            min=1.0,
            max=30.0,
            step=0.5,
            tooltip="How closely previews follow their prompts, like the cfg of a KSampler. 1 is right for models "
            "that take guidance as an input, such as Flux, and for the tiny base; it takes half the time.",
        ),
        io.Clip.Input("clip", tooltip="The text encoder of the model, for the prompts."),
        io.Vae.Input(
            "vae",
            optional=True,
            tooltip="The VAE of the model. Without one, or without memory for it, the images are small and blurred.",
        ),
        io.Boolean.Input(
            "previews",
            default=True,
            optional=True,
            tooltip="Whether previews are drawn. Off saves their time; the trained style is the same.",
        ),
        io.Float.Input(
            "preview_share",
            default=0.2,
            min=0.01,
            max=1.0,
            step=0.05,
            optional=True,
            tooltip="Largest fraction of the training time that previews may take: 0.2 is a fifth. If they would take "
            "more, they are drawn less often than preview_every says. A larger fraction shows more of them. Previews "
            "of the steps that are kept are always drawn.",
        ),
    ]
