"""Which images are held out of a training, and which are copies of each other."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from ..diffusion import TrainingSet
from .sampler import style_indices

MIN_IMAGES = 8  # with fewer, each is worth more to the training than to the validation
MAX_HELD_OUT = 12  # more would only be measured more rarely


def hold_out(images: TrainingSet, indices: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split images into (those to train on, those held out), drawn by the seed.

    Copies of an image are never on both sides. Nothing is held out of fewer than eight different images, or where the
    fraction is 0. Regularisation images are neither counted nor held out, as they do not belong to the style.
    """
    if fraction == 0:
        return list(indices), []
    different = different_images(images, style_indices(images, indices))
    if len(different) < MIN_IMAGES:
        return list(indices), []
    count = min(max(1, round(fraction * len(different))), MAX_HELD_OUT, len(different) - 1)
    order = torch.randperm(len(different), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [different[position] for position in order[:count]]
    held_out = sorted(group[0] for group in chosen)
    excluded = {index for group in chosen for index in group}
    return [index for index in indices if index not in excluded], held_out


def different_images(images: TrainingSet, indices: Sequence[int]) -> list[list[int]]:
    """Return a list for each different image, of its index and those of its copies, which have an equal latent."""
    copies: dict[bytes, list[int]] = {}
    for index in indices:
        content = images.latents[index].contiguous().cpu().view(torch.uint8).numpy().tobytes()
        copies.setdefault(hashlib.blake2b(content).digest(), []).append(index)
    return list(copies.values())
