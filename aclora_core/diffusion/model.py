"""A diffusion model as training sees it, whoever provides it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..acceleration import FusableModules, WeightStream
from .objective import Objective


class DiffusionModel(Protocol):
    """A frozen network that denoises, and the text encoders that may learn with it.

    nodes/host makes one from ComfyUI's MODEL; SimpleModel makes one from a network of your own.
    """

    @property
    def network(self) -> nn.Module:
        """The network whose layers get LoRA branches."""

    @property
    def prefix(self) -> str:
        """The text before the layers' names in a LoRA file."""

    @property
    def device(self) -> torch.device:
        """The device that the network is on."""

    @property
    def dtype(self) -> torch.dtype:
        """The type that the network computes in."""

    @property
    def objective(self) -> Objective:
        """How the model adds noise and what it predicts."""

    @property
    def fusable(self) -> FusableModules:
        """The host's module classes that have a faster forward pass."""

    @property
    def weight_stream(self) -> WeightStream | None:
        """What brings the weights that do not fit on the device; None if all are there."""

    @property
    def text_encoders(self) -> Mapping[str, nn.Module]:
        """The text encoders that learn too, by the prefix of their layers' names; most often none."""

    def denoise(self, noisy: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
        """Predict the clean latents (x0).

        Args:
            noisy: (n, channels, ...), on the device.
            sigma: (n,), noise levels.
            conditioning: as TrainingSet.conditioning gives it, on the device.
        """

    def is_unpatched(self, layer: nn.Module) -> bool:
        """Return whether a layer computes with its own weight and nothing else: it can be fused with its branch.

        It may convert the weight to the dtype of its input.
        """

    def free_memory(self, wanted: int) -> int | None:
        """Return the bytes free on the device after others made room for `wanted`; None where nobody knows."""


@dataclass
class SimpleModel:
    """A DiffusionModel around a network of your own.

    `predict` calls the network: (noisy, sigma, conditioning) -> its raw output, of the shape of noisy. The objective
    turns the raw output into clean latents.
    """

    network: nn.Module
    objective: Objective
    predict: Callable[[Tensor, Tensor, Any], Tensor]
    prefix: str = "diffusion_model."
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    fusable: FusableModules = FusableModules()
    weight_stream: WeightStream | None = None
    text_encoders: Mapping[str, nn.Module] = field(default_factory=dict)

    def denoise(self, noisy: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
        """Predict the clean latents (x0)."""
        return self.objective.denoised(sigma, self.predict(noisy, sigma, conditioning), noisy)

    def is_unpatched(self, layer: nn.Module) -> bool:
        """Every layer of a plain network computes with its own weight."""
        return True

    def free_memory(self, wanted: int) -> int | None:
        """Return the bytes free on a CUDA device; None elsewhere."""
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else None
