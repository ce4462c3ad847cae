"""Early stopping by how well the adapter fits its images: the loss of a few training images at fixed noise.

A style is learned when the model predicts its images much better than before, and from some point on only the images
themselves are learned. Judged by the images that adapters draw, a fixed share of the model's own loss finds a good step
in styles and sets of images of different sizes (bench/README.md), while the lowest loss of held-out images comes so
early that it is worse than any fixed number of steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..adapter import fit_share
from ..diffusion import TrainingSet
from ..text import percent_text
from .held_out import different_images
from .measurements import Measurements

LEVEL = 0.18  # share of the model's own loss at which a training ends
MIN_STEPS = 560  # before that a few images would end it before their style is there
MAX_IMAGES = 8  # that are measured


class FitStopping(Measurements):
    """Measures training images now and then, and says when the adapter fits them well enough."""

    def ends_training(self) -> bool:
        """Return whether the loss has fallen to its level, since a restart too."""
        if self.share is None:
            return False
        step = self.history[-1][0]
        return step >= MIN_STEPS and step - self.last_restart >= MIN_STEPS / 2 and self.share <= LEVEL

    @property
    def reason(self) -> str:
        """Why the training ends, as a clause."""
        return f"the loss of its training images has fallen to {percent_text(self.share or 0)} of the base model's"

    @property
    def share(self) -> float | None:
        """The share of the model's own loss that is left (fit_share)."""
        return fit_share(self.history)


def measured_images(images: TrainingSet, indices: Sequence[int], seed: int) -> list[int]:
    """Return the indices of the training images to measure, each a different image, drawn by the seed."""
    different = [copies[0] for copies in different_images(images, indices)]
    order = torch.randperm(len(different), generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(different[position] for position in order[:MAX_IMAGES])
