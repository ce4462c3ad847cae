"""ComfyUI's latents and conditionings as the set of images that a model is trained on."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .conditioning import condition_of
from .conditioning_lengths import Lengths, repeated
from .text_encoder import TextEncoder


@dataclass
class HostTrainingSet:
    """Latents with their conditionings, as aclora_core.TrainingSet. An image is known by its index."""

    base: Any  # ComfyUI's BaseModel, which prepares conditionings
    device: torch.device
    latents: list[Tensor]  # each (1, channels, ...), float32, in main memory
    conditions: list[dict[str, Any]]  # for each image, what the model takes besides noise, by name
    batch_keys: list[Hashable]
    variants: dict[int, list[int]] = field(default_factory=dict)
    masks: dict[int, Tensor] = field(default_factory=dict)
    regularisation: dict[int, float] = field(default_factory=dict)
    lengths: Lengths = field(default_factory=dict)  # to which shorter captions are repeated
    text: TextEncoder | None = None  # where it learns too

    @property
    def commonest_shape(self) -> tuple[int, ...]:
        """The shape that most latents have."""
        shapes = [tuple(latent.shape) for latent in self.latents]
        return max(set(shapes), key=shapes.count)

    @property
    def resolution(self) -> str:
        """Width x height in pixels of images of the commonest shape."""
        *_, height, width = self.commonest_shape
        pixels = self.base.latent_format.spacial_downscale_ratio
        return f"{width * pixels}x{height * pixels}"

    def conditioning(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return what the model takes besides noise, by name, for images with one batch key; in main memory."""
        first, *others = [self._condition(index) for index in indices]
        # Images with one batch key have conditions of one shape, so ComfyUI joins them without padding.
        return {name: cond.concat([other[name] for other in others]) for name, cond in first.items()}

    def _condition(self, index: int) -> dict[str, Any]:
        if self.text is None:
            return self.conditions[index]
        conditioning = self.text.encode(self.text.captions[index])
        return repeated(condition_of(self.base, conditioning, self.latents[index], self.device), self.lengths)
