"""Masks of pictures: how much each place of a latent counts in the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .model import Model

_BLACK = 0.02  # a mask that is nowhere brighter has nothing to learn from; files with losses have such dust in black


def at_latent_size(mask: Tensor, latent: Tensor) -> Tensor:
    """A mask (height, width) in 0..1 as float32 (1, 1, ..., h, w) with the sides of a latent (1, channels, ..., h, w).

    Every place of the latent gets the mean of the area that it stands for.
    """
    height, width = latent.shape[-2:]
    small = torch.nn.functional.adaptive_avg_pool2d(mask.float()[None, None], (height, width))
    return small.reshape(1, *(1 for _ in latent.shape[1:-2]), height, width)


def is_black(mask: Tensor, step: int = 1) -> bool:
    """Whether nothing would be learned of a picture with this mask, (..., height, width), in means of step × step."""
    flat = mask.float().reshape(1, 1, *mask.shape[-2:])
    return float(torch.nn.functional.avg_pool2d(flat, step).max()) < _BLACK


def position_weights(mask: Tensor, floor: float = 0.0) -> Tensor:
    """What each place counts, of the mask's shape: floor where it is black, 1 where it is white, over their mean.

    The mean of the weights is 1, so a picture with a small mask counts as much as one without, and its loss is the
    mean over what is white.
    """
    weights = floor + (1.0 - floor) * mask.float()
    return weights / weights.mean()


def joined_weights(model: Model, pictures: Sequence[int], floor: float) -> Tensor | None:
    """The weights of the places of pictures of one group, (n, 1, ..., h, w); None where no picture has a mask.

    All pictures of a training get them, or none: what is recorded in a graph always has the same inputs.
    """
    if not model.masks:
        return None
    rows = []
    for number in pictures:
        latent = model.latents[number]
        shape = (1, *(1 for _ in latent.shape[1:-2]), *latent.shape[-2:])
        rows.append(position_weights(model.masks[number], floor) if number in model.masks else torch.ones(shape))
    return torch.cat(rows)
