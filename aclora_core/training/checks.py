"""Checks of what a training is given, before any work is done."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import TrainConfig
from ..diffusion import TrainingSet
from .sampler import style_indices


def check_inputs(images: TrainingSet, config: TrainConfig, indices: Sequence[int]) -> None:
    """Check that the images have all that the settings need.

    Args:
        images: latents and conditionings.
        config: the settings.
        indices: of the images to learn from.

    Raises:
        ValueError: there are no images, or no conditioning of the empty caption where it is needed.
    """
    if not style_indices(images, indices):
        raise ValueError("There are no images to learn from.")
    if config.needs_unconditional and not images.without_caption:
        raise ValueError(
            "caption_dropout and prior_weight need the conditioning of the empty caption, and there is none. Connect a "
            "CLIP Text Encode with an empty text to unconditional of AC-LoRA Learning Options, or set both to 0."
        )
