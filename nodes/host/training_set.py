"""ComfyUI's latents and conditionings as a TrainingSet."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...aclora_core.text import error_reason
from .conditioning import batch_key, model_conditions
from .conditioning_lengths import Lengths, repeat_to_common_length
from .text_encoder import TextEncoder, recorded_captions

log = logging.getLogger("aclora")


@dataclass
class HostTrainingSet:
    """Latents with their conditionings, as aclora_core.TrainingSet. Images are given by index."""

    base: Any  # ComfyUI's BaseModel, which prepares conditionings
    device: torch.device
    latents: list[Tensor]  # each (1, channels, ...), float32, in main memory
    conditions: list[dict[str, Any]]  # of each image, the model's inputs besides noise, by name
    batch_keys: list[Hashable]
    variants: dict[int, list[int]] = field(default_factory=dict)  # all variants of an image, by the first one
    masks: dict[int, Tensor] = field(default_factory=dict)  # in 0 to 1, of the latent's height and width
    regularisation: dict[int, float] = field(default_factory=dict)  # weights of the regularisation images
    without_caption: dict[int, int] = field(default_factory=dict)  # image -> the same image with the empty caption
    lengths: Lengths = field(default_factory=dict)  # to which shorter captions are repeated
    text: TextEncoder | None = None  # if it is trained too
    prompts: list[int] = field(default_factory=list)  # rows that are only drawn

    @property
    def commonest_shape(self) -> tuple[int, ...]:
        """The most common shape of the latents."""
        shapes = [tuple(latent.shape) for latent in self.latents]
        return max(set(shapes), key=shapes.count)

    @property
    def resolution(self) -> str:
        """Width x height in pixels of the images of the most common shape."""
        *_, height, width = self.commonest_shape
        pixels = self.base.latent_format.spacial_downscale_ratio
        return f"{width * pixels}x{height * pixels}"

    def add_prompts(self, conditionings: Sequence[Any]) -> None:
        """Append captions that are only drawn, with latents of the commonest shape; none where that fails.

        Captions of the images are not repeated to the length of these, so that they change nothing that is learned.

        Args:
            conditionings: ComfyUI's, with their captions recorded where a text encoder is trained.
        """
        empty = torch.zeros(self.commonest_shape)
        try:
            captions = recorded_captions(conditionings) if self.text else []
            with torch.no_grad():
                found = [model_conditions(self.base, each, empty, self.device) for each in conditionings]
        except Exception as error:  # whatever a model does with captions of another one's text encoder
            log.warning("AC-LoRA: what the previews' prompts gain is not measured: %s.", error_reason(error))
            return
        for condition in (repeat_to_common_length(each, self.lengths) for each in found):
            self.prompts.append(len(self.latents))
            self.latents.append(empty)
            self.conditions.append(condition)
            self.batch_keys.append(batch_key(empty, condition))
        if self.text:
            self.text.captions += captions

    def conditioning(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return the model's inputs besides noise, by name, for images with one batch key; in main memory."""
        first, *others = [self._condition(index) for index in indices]
        # Images with one batch key have conditions of one shape, so ComfyUI joins them without padding.
        return {name: cond.concat([other[name] for other in others]) for name, cond in first.items()}

    def _condition(self, index: int) -> dict[str, Any]:
        if self.text is None:
            return self.conditions[index]
        conditioning = self.text.encode(self.text.captions[index])
        return repeat_to_common_length(
            model_conditions(self.base, conditioning, self.latents[index], self.device), self.lengths
        )
