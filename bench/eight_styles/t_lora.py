"""T-LoRA: a LoRA whose rank depends on the noise level (Soboleva et al. 2025, arXiv 2507.05964).

At high noise, where a network overfits most, only the first ranks of a layer are used; with less noise there are more.
Each layer starts from the singular vectors of a random matrix, so that its ranks are independent of each other, and
what it starts from is subtracted again (the paper's Ortho-LoRA).

As in the authors' training of SDXL, the smallest rank is half of the largest, the random matrix has the standard
deviation 1 / rank, the start is its last singular vectors, and there is no alpha.

Left out or different: the authors adapt the linear layers of the attention only, learn one image under a new word, and
draw one timestep for a whole batch; here all layers are adapted, and each image of a batch has the mask of its own
noise level. LyCORIS has a T-LoRA too, but with one mask for all images and 1 × 1 kernels beside larger ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from aclora_core.acceleration import CONVOLUTIONS
from aclora_core.diffusion import DiffusionModel, Objective

from .library_adapters import Adapter, Request

TIMESTEPS = 1000  # T of the paper


class RankMask:
    """Which ranks are used, for each image of a batch.

    Args:
        objective: maps timesteps to noise levels.
        rank: the largest, at timestep 0; the smallest, at the last timestep, is half of it.
        device: of the noise levels and the mask.

    Attributes:
        current: (n, rank) float32, 1 for ranks that are used and 0 for the others; all are, until `use_at` is called.
    """

    def __init__(self, objective: Objective, rank: int, device: torch.device) -> None:
        steps = range(TIMESTEPS + 1)
        self._levels = torch.tensor([objective.sigma_at(step / TIMESTEPS) for step in steps], device=device)
        self._ranks = torch.tensor([rank_at(step, rank, rank // 2) for step in steps], device=device)
        self._numbers = torch.arange(rank, device=device)
        self.current = torch.ones(1, rank, device=device)

    def use_at(self, sigma: Tensor) -> None:
        """Set the mask for noise levels, (n,)."""
        timesteps = torch.searchsorted(self._levels, sigma.float()).clamp_max(TIMESTEPS)
        self.current = (self._numbers < self._ranks[timesteps].unsqueeze(1)).float()


def rank_at(timestep: int, rank: int, smallest: int) -> int:
    """Return floor((rank - smallest) · (T - t) / T) + smallest, the rank at timestep t of 0 to T."""
    return (rank - smallest) * (TIMESTEPS - timestep) // TIMESTEPS + smallest


def t_lora(request: Request) -> Adapter:
    """Put T-LoRA on a network. It reads the noise levels from the calls of network.denoise."""
    network = request.network
    mask = RankMask(network.objective, request.rank, network.device)
    _read_noise_levels(network, mask)
    modules = {}
    for name, layer in request.layers.items():
        modules[name] = OrthogonalLora(layer, request.rank).to(network.device)
        layer.register_forward_hook(_added(modules[name], mask))
    parts = nn.ModuleDict({name.replace(".", "_"): module for name, module in modules.items()})
    # The start is random, so the file needs it too.
    return Adapter(list(modules.values()), dict(parts.named_parameters()), tensors=parts.state_dict)


def _read_noise_levels(network: DiffusionModel, mask: RankMask) -> None:
    denoise = network.denoise

    def masked(noisy: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
        mask.use_at(sigma)
        return denoise(noisy, sigma, conditioning)

    vars(network)["denoise"] = masked


def _added(branch: OrthogonalLora, mask: RankMask) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + branch(inputs[0], mask.current).to(output.dtype)

    return hook


class OrthogonalLora(nn.Module):
    """The branch of one layer: P (λ m (Q x)) minus the same with the values of the start, where m is the mask.

    Args:
        layer: a linear layer or a convolution.
        rank: lowered to the full rank of the layer's weight.
    """

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        outputs, *inputs = layer.weight.shape
        self.convolve, self.place = _convolution(layer)
        rank = min(rank, outputs, math.prod(inputs))
        u, s, vh = torch.linalg.svd(torch.randn(outputs, math.prod(inputs)) / rank, full_matrices=False)
        start = {
            "down": vh[-rank:].reshape(rank, *inputs),
            "values": s[-rank:],
            "up": u[:, -rank:].reshape(outputs, rank, *(1 for _ in inputs[1:])),
        }
        for name, value in start.items():
            self.register_parameter(name, nn.Parameter(value.clone()))
            self.register_buffer(f"start_{name}", value.clone())

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return what the branch adds.

        Args:
            x: the layer's input, (n, ..., in) or (n, in, ...); computed in float32.
            mask: (n, rank) or (1, rank).
        """
        down, up = torch.cat([self.down, self.start_down]), torch.cat([self.up, self.start_up], 1)
        used = mask[:, : len(self.values)]
        scale = torch.cat([self.values * used, -self.start_values * used], 1)
        if self.convolve is None:
            scale = scale.view(len(scale), *(1 for _ in x.shape[1:-1]), -1)
            return nn.functional.linear(nn.functional.linear(x.float(), down) * scale, up)
        reduced = self.convolve(x.float(), down, None, **self.place)
        return self.convolve(reduced * scale.view(*scale.shape, *(1 for _ in reduced.shape[2:])), up)


def _convolution(layer: Any) -> tuple[Callable[..., Tensor] | None, dict[str, Any]]:
    """Return the function of a convolution and its stride, padding and dilation; None for a linear layer."""
    for kind, convolve in CONVOLUTIONS.items():
        if isinstance(layer, kind):
            return convolve, {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    return None, {}
