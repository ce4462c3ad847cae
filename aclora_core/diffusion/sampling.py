"""Draw latents with a model as it is, without a host's sampler: Euler's method from fixed noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .model import DiffusionModel

_FIRST = 1 - 1e-3  # noise fraction of the first step; at 1 a host may map to an infinite sigma


def draw_latents(model: DiffusionModel, noise: Tensor, conditioning: Any, steps: int) -> Tensor:
    """Draw latents by Euler's method, without guidance (Karras et al. 2022, arXiv 2206.00364, Eq. 1 and Algorithm 2).

    With the clean latents x0 that the model predicts, dx/dσ = (x - x0) / σ holds for every noise process of Objective.

    Args:
        model: as it is, with or without an adapter.
        noise: (n, channels, ...), standard normal; the same noise gives the same latents.
        conditioning: of n captions, on the model's device.
        steps: forward passes; noise fractions are spaced evenly.

    Returns:
        (n, channels, ...), float32, on the model's device.
    """
    objective = model.objective
    sigmas = [objective.sigma_at(_FIRST * (1 - step / steps)) for step in range(steps)] + [0.0]
    noise = noise.to(model.device, torch.float32)
    rows = torch.ones(len(noise), device=model.device)
    with torch.no_grad():
        x = objective.add_noise(rows * sigmas[0], noise, torch.zeros_like(noise))
        for sigma, following in zip(sigmas, sigmas[1:], strict=False):
            clean = model.denoise(x, rows * sigma, conditioning).float()
            x = x + (x - clean) * ((following - sigma) / sigma)
    return x
