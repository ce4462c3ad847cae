"""The evaluation node: drawn and real images become measures, a verdict, and an image of the nearest pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ...aclora_core.evaluation import (
    ImageFeatures,
    evaluate,
    evaluation_json,
    evaluation_lines,
    evaluation_table,
)
from .. import host
from ..node_images import images_on_node
from .images import read_images, read_prompts
from .networks import Networks, clip_similarity
from .preference import preference_rows
from .sheet import nearest_sheet

if TYPE_CHECKING:
    from comfy.clip_vision import ClipVisionModel
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE


@dataclass(frozen=True, eq=False)
class _Images:
    """The sets of images; each image is (height, width, 3)."""

    drawn: list[Tensor]
    references: list[Tensor]
    base: list[Tensor] | None
    training: list[Tensor] | None

    @property
    def all(self) -> list[Tensor]:
        return [*self.drawn, *self.references, *(self.base or []), *(self.training or [])]

    @property
    def paired_base(self) -> list[Tensor] | None:
        """What the base draws for the same prompts, if the numbers match."""
        return self.base if self.base and len(self.base) == len(self.drawn) else None


class ACLoRAEvaluate(io.ComfyNode):
    """Compares drawn images with real ones, with the base's and with the training images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ACLoRAEvaluate",
            display_name="Evaluate AC-LoRA",
            category="AC-LoRA",
            description="Judges a LoRA by what it draws: is it closer to the style than the base model, and does it "
            "copy training images?",
            search_aliases=["evaluate lora", "clip score", "kid", "cmmd", "image similarity", "overfitting", "copies"],
            is_output_node=True,
            is_input_list=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Image.Input("drawn", tooltip="Images drawn with the LoRA. Use 12 or more for a reliable verdict."),
                io.MultiType.Input(
                    "reference",
                    types=[io.Image, io.Latent],
                    tooltip="Validation images: real images of the style that were not trained on, or the latents of "
                    "a Load AC-LoRA Dataset node (connect vae too). Best are images of the same subjects as the drawn "
                    "ones, in the same order, with pairs switched on.",
                ),
                io.Image.Input(
                    "base",
                    optional=True,
                    tooltip="Images drawn without the LoRA for the same prompts and seeds, in the same order. They "
                    "show what the LoRA has changed.",
                ),
                io.MultiType.Input(
                    "training",
                    types=[io.Image, io.Latent],
                    optional=True,
                    tooltip="The training images, or the latents of the Load AC-LoRA Dataset node (connect vae too). "
                    "With them, the drawn images are checked for copies.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="The network that compares images, from Load CLIP Vision: CLIP, SigLIP or DINO. It is the "
                    "better choice, as it is independent of the model. Without it, connect model, vae and clip.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model without the LoRA. Where no clip_vision is connected, its denoiser compares the"
                    " images.",
                ),
                io.Vae.Input(
                    "vae", optional=True, tooltip="The model's VAE, for latents and for the model's denoiser."
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The model's CLIP, for the model's denoiser; or, beside a clip_vision, the text encoder of"
                    " the same CLIP model, for CLIP-T.",
                ),
                io.String.Input(
                    "prompts",
                    optional=True,
                    default="",
                    multiline=True,
                    tooltip="The prompts of the drawn images, one in each line, or one for all. For CLIP-T and"
                    " preference.",
                ),
                io.Boolean.Input(
                    "pairs",
                    optional=True,
                    default=False,
                    tooltip="On: each reference shows the subject of the drawn image at the same position, so that "
                    "content is judged as well as style.",
                ),
                io.Boolean.Input(
                    "preference",
                    optional=True,
                    default=False,
                    advanced=True,
                    tooltip="On: the drawn images are also scored with ImageReward and HPS, if their Python packages "
                    "are installed. Their weights are downloaded on first use.",
                ),
            ],
            outputs=[
                io.String.Output("TABLE", display_name="table", tooltip="The verdict and all measures as text."),
                io.String.Output("JSON", display_name="json", tooltip="The same as JSON, for programs."),
                io.Image.Output(
                    "NEAREST",
                    display_name="nearest",
                    tooltip="Each drawn image beside the training image and the reference most similar to it; the "
                    "most similar first.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        drawn: list[Tensor],
        reference: list[Any],
        base: list[Tensor] | None = None,
        training: list[Any] | None = None,
        clip_vision: list[ClipVisionModel | None] | None = None,
        model: list[ModelPatcher | None] | None = None,
        vae: list[VAE | None] | None = None,
        clip: list[CLIP | None] | None = None,
        prompts: list[str] | None = None,
        pairs: list[bool] | None = None,
        preference: list[bool] | None = None,
    ) -> io.NodeOutput:
        networks = Networks(_first(clip_vision), _first(model), _first(vae), _first(clip))
        networks.check()
        images = _Images(
            read_images("drawn", drawn, None),
            read_images("reference", reference, networks.vae),
            read_images("base", base, None) if base else None,
            read_images("training", training, networks.vae) if training else None,
        )
        texts = read_prompts(prompts or [], len(images.drawn))
        judged = bool(_first(preference))
        node_id = host.hidden_node_id(cls)
        bar = host.ProgressBar(len(images.all) + (2 * _judged_count(images, texts) if judged else 0), node_id)
        with torch.no_grad():
            extract = networks.extractor(images.all, bar.advance)
            features = _features(extract, images)
            found = evaluate(features, bool(_first(pairs)))
            found.rows.append(clip_similarity(networks, texts, features))
        if judged:
            found.rows.extend(preference_rows(texts, images.drawn, images.paired_base, bar.advance))
        sheet = nearest_sheet(found.nearest, images.drawn, images.references, images.training, host.dark_theme())[None]
        lines = evaluation_lines(found)
        shown, problem = images_on_node(sheet, cls)
        lines += problem and f"\n{problem}"
        host.send_text(lines, node_id)
        texts_out = evaluation_table(found, extract.name), evaluation_json(found, extract.name)
        return io.NodeOutput(*texts_out, sheet, ui={**shown, "text": (lines,)})


def _features(extract: Callable[[Sequence[Tensor]], Tensor], images: _Images) -> ImageFeatures:
    return ImageFeatures(
        extract(images.drawn),
        extract(images.references),
        extract(images.base) if images.base else None,
        extract(images.training) if images.training else None,
    )


def _judged_count(images: _Images, prompts: Sequence[str]) -> int:
    return len(images.drawn) + len(images.paired_base or []) if prompts else 0


def _first(values: Sequence[Any] | None) -> Any:
    """Return the value of an input that is not a list: every input of this node comes as one."""
    return values[0] if values else None
