"""Captioned images as training sees them: latents, conditionings, and what belongs to them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

_Value = TypeVar("_Value")


class TrainingSet(Protocol):
    """Captioned images, already encoded. An image is known by its index into `latents`."""

    @property
    def latents(self) -> Sequence[Tensor]:
        """One latent per image, each (1, channels, ...), float32, as the network expects it."""

    @property
    def batch_keys(self) -> Sequence[Hashable]:
        """What images of one micro-batch must have in common, such as the shape of the latent; one per image."""

    @property
    def variants(self) -> Mapping[int, Sequence[int]]:
        """The index of an image -> the indices of all its augmented versions; empty without augmentation."""

    @property
    def masks(self) -> Mapping[int, Tensor]:
        """The masks of the images that have one, (1, 1, ..., h, w) in 0..1, at the size of the latent."""

    @property
    def regularisation(self) -> Mapping[int, float]:
        """The weight in the training loss of each image that does not belong to the style."""

    @property
    def without_caption(self) -> Mapping[int, int]:
        """The index of an image -> the index of the same image with the empty caption; empty where none is known."""

    @property
    def prompts(self) -> Sequence[int]:
        """The indices of captions that are only drawn: their latents give the shape and are not learned from."""

    def conditioning(self, indices: Sequence[int]) -> Any:
        """Return the encoded captions of images with one batch key, as DiffusionModel.denoise takes them.

        Tensors in nested dictionaries and lists, with one row per image. Where a text encoder learns, they carry its
        gradient history.
        """


@dataclass
class SimpleTrainingSet:
    """A TrainingSet of latents and one tensor of conditioning for each; images of one shape share micro-batches."""

    latents: Sequence[Tensor]  # each (1, channels, ...)
    conditionings: Sequence[Tensor]  # each (1, ...), all of one shape
    variants: Mapping[int, Sequence[int]] = field(default_factory=dict)
    masks: Mapping[int, Tensor] = field(default_factory=dict)
    regularisation: Mapping[int, float] = field(default_factory=dict)
    without_caption: Mapping[int, int] = field(default_factory=dict)
    prompts: Sequence[int] = ()

    @cached_property
    def batch_keys(self) -> Sequence[Hashable]:
        """The shape of each latent; made once, as every micro-batch asks for it."""
        return [tuple(latent.shape) for latent in self.latents]

    def conditioning(self, indices: Sequence[int]) -> Tensor:
        """Return the conditionings of the images, (n, ...)."""
        return torch.cat([self.conditionings[index] for index in indices])

    def with_unconditional(self, unconditional: Tensor) -> SimpleTrainingSet:
        """Return a copy that knows every image with the empty caption too, for caption dropout and prior preservation.

        Args:
            unconditional: (1, ...), the conditioning of the empty caption.
        """
        without_caption = {index: index + len(self.latents) for index in range(len(self.latents))}
        return replace(
            self,
            latents=[*self.latents, *self.latents],
            conditionings=[*self.conditionings, *[unconditional] * len(self.latents)],
            masks=_also(self.masks, without_caption),
            regularisation=_also(self.regularisation, without_caption),
            without_caption=without_caption,
        )


def _also(values: Mapping[int, _Value], without_caption: Mapping[int, int]) -> dict[int, _Value]:
    """Return what belongs to images, by index, for the same images without their captions as well."""
    return {**values, **{without_caption[index]: value for index, value in values.items()}}
