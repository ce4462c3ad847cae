"""One micro-batch: what goes through the model at once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """A micro-batch of images with one batch key. Every tensor has one row per image.

    A step reports the plain denoising loss, weighted by `weight`. It learns from the training loss, which may weigh
    images and noise levels differently.
    """

    latents: Tensor  # (n, channels, ...), clean
    noise: Tensor  # of the same shape, standard normal
    sigma: Tensor  # (n,), noise levels
    weight: Tensor  # (n,), weight of each image in the reported loss
    conditioning: Any  # the captions: tensors in nested dictionaries and lists
    key: Hashable  # equal for batches that differ in the values of their tensors only
    indices: Sequence[int] = ()  # of the images in the training set
    noise_level_weight: Tensor | None = None  # (n,), weight of each noise level in the training loss
    train_weight: Tensor | None = None  # (n,), weight of each image in the training loss, where it is not `weight`
    position_weights: Tensor | None = None  # (n, 1, ..., h, w), from masks; their mean over an image is 1
    prior: bool = False  # whether the target is the frozen model's own prediction (prior preservation)
