"""What training needs from a model and its pictures, whoever provides them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..acceleration import FusableModules
from .objective import Objective


class Model(Protocol):
    """A diffusion model with a set of captioned pictures; nodes/host makes one from the host's MODEL."""

    network: nn.Module  # whose layers get branches
    prefix: str  # stands before their names in a LoRA file
    device: torch.device
    dtype: torch.dtype  # that the network computes in
    latents: Sequence[Tensor]  # each (1, channels, ...), as the network expects it, in float32
    batch_keys: Sequence[Hashable]  # what pictures of one batch have in common
    variants: Mapping[int, Sequence[int]]  # a picture's number -> those of all its variants; empty without variants
    masks: Mapping[int, Tensor]  # (1, 1, ..., h, w) in 0..1 of the latents that have one; at the latent's size
    regularisation: Mapping[int, float]  # numbers that are no part of the style -> what each counts in what is learned
    objective: Objective
    fusable: FusableModules
    text_encoders: Mapping[str, nn.Module]  # that learn too, by the prefix of their layers' names; most often none

    def conditioning(self, pictures: Sequence[int]) -> Any:
        """The captions of pictures of one group, as denoise wants them: tensors in nested dictionaries and lists.

        Where text encoders learn, it is what they give now, and gradients flow through it back to them.
        """
        ...

    def denoise(self, noisy: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        """x0 for noisy (n, channels, ...) at sigma (n,), everything on the device."""
        ...

    def is_unpatched(self, layer: nn.Module) -> bool:
        """Whether a layer of the network computes with its own weight as it is, and nothing else."""
        ...

    def free_memory(self, wanted: int) -> int | None:
        """Bytes that are free on the device after asking others to make room for so many; None where nobody knows."""
        ...
