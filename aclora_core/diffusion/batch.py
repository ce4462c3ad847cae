"""One micro-batch: what goes through the model at once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """What goes through the model at once. Every tensor has one row for each picture."""

    latents: Tensor  # (n, channels, ...)
    noise: Tensor  # of the same shape
    sigma: Tensor  # (n,), noise levels
    weight: Tensor  # (n,), of each picture in the loss of its step
    conditioning: Any  # what the model wants besides: tensors in nested dictionaries and lists
    key: Hashable  # alike for batches that differ in the values of their tensors only
    pictures: Sequence[int] = ()  # their numbers
    loss_weight: Tensor | None = None  # (n,), of each noise level, in what is learned and not in the loss that is told
    learned: Tensor | None = None  # (n,), of each picture in what is learned, where that is not its weight
    positions: Tensor | None = None  # (n, 1, ..., h, w), of each place of the latents; their mean in a picture is 1
