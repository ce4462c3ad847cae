"""What a training step draws and what it compares: noise levels, the model's own target, and a loss that means the
same for every kind of prediction.

All of it follows from three functions of the model: how it adds noise, how it turns its raw output into the picture
without noise (x0), and which noise level belongs to a share of the way. Nothing here asks what the model predicts: x0
is linear in the raw output, so two calls tell the gain, and the error of x0 over the gain is the error of the output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from ..config import LossWeighting, Timesteps

Sampling = Literal["shifted", "uniform", "logit-normal"]


@dataclass(frozen=True)
class Objective:
    """A model's noise, as three functions. sigma: (n,); the others (n, channels, ...)."""

    add_noise: Callable[[Tensor, Tensor, Tensor], Tensor]  # sigma, noise, latent -> noisy
    denoised: Callable[[Tensor, Tensor, Tensor], Tensor]  # sigma, raw output, noisy -> x0
    sigma_at: Callable[[float], float]  # share of the way, 0 (clean) to 1 (noise alone) -> sigma
    sampling: Sampling  # how the shares are drawn
    prediction: str = "a target of its own"  # what the model gives, in a word
    # For flow models: the odds of a latent's noise levels, by its size, over those of the size that sigma_at is for.
    shift_of: Callable[[Tensor], float] | None = None


def with_timesteps(objective: Objective, wanted: Timesteps) -> Objective:
    """The objective with noise levels drawn as wished; "automatic" leaves what suits the model.

    Raises:
        ValueError: "shifted", and the model is no flow model.
    """
    if wanted == "automatic":
        return objective
    if wanted == "shifted" and objective.shift_of is None:
        raise ValueError(
            f"Timesteps can be drawn shifted for flow models only, but this one predicts {objective.prediction}. Set "
            "timesteps to automatic."
        )
    return replace(objective, sampling=wanted)


def draw_sigmas(objective: Objective, count: int, generator: torch.Generator, latent: Tensor | None = None) -> Tensor:
    """Noise levels (count,), float32, drawn from a generator on the CPU.

    "uniform": every share of the way alike. "logit-normal": sigmoid of a standard normal, the middle most often (Esser
    et al. 2024, arXiv 2403.03206, section 3.1). "shifted": the same with the odds of the shares multiplied by what
    suits the latent's size, since in a larger picture it takes more noise to hide as much (section 5.3.2).
    """
    if objective.sampling not in get_args(Sampling):
        *others, last = get_args(Sampling)
        raise ValueError(f"Timesteps are drawn {', '.join(others)} or {last}, not '{objective.sampling}'.")
    if objective.sampling == "uniform":
        shares = torch.rand(count, generator=generator)
    else:
        logits = torch.randn(count, generator=generator)
        if objective.sampling == "shifted" and objective.shift_of and latent is not None:
            logits = logits + math.log(objective.shift_of(latent))
        shares = torch.sigmoid(logits)
    # The ends are left out: at share 0 nothing is to be predicted, and a host may answer share 1 with infinity.
    return torch.tensor([objective.sigma_at(share) for share in shares.clamp(1e-3, 1 - 1e-3).tolist()])


def output_gain(objective: Objective, sigma: Tensor, noisy: Tensor) -> Tensor:
    """∂x0 / ∂output for each element, of the shape of noisy."""
    zero = torch.zeros_like(noisy)
    return objective.denoised(sigma, zero + 1, noisy) - objective.denoised(sigma, zero, noisy)


def target(objective: Objective, sigma: Tensor, noisy: Tensor, latent: Tensor) -> Tensor:
    """The raw output that would be right: ε, v, flow velocity or x0, whichever the model gives."""
    zero = objective.denoised(sigma, torch.zeros_like(noisy), noisy)
    return (latent - zero) / output_gain(objective, sigma, noisy)


def signal_to_noise(objective: Objective, sigma: Tensor) -> Tensor:
    """Variance of the latent over that of the noise in what the model sees, (n,), for latents of variance 1."""
    nothing = torch.zeros(len(sigma), 1, 1, 1, dtype=sigma.dtype)
    signal = objective.add_noise(sigma, nothing, nothing + 1)
    noise = objective.add_noise(sigma, nothing + 1, nothing)
    return (signal / noise).square().flatten()


def loss_weights(objective: Objective, sigma: Tensor, kind: LossWeighting, gamma: float) -> Tensor | None:
    """What noise levels (n,) on the CPU count in the loss of the raw output, (n,) in float32; None where all count 1.

    With r the signal-to-noise ratio and g = ∂x0 / ∂output, a weight w of the error of x0 is w · g² of the output's.
    "min-SNR": w = min(r, γ) (Hang et al. 2023, arXiv 2303.09556), so min(r, γ) / r for ε and
    min(r, γ) / (r + 1) for v. "debiased": w = √r, so 1 / √r for ε (Yu et al. 2023, arXiv 2310.08442).
    """
    if kind == "none":
        return None
    exact = sigma.double()
    ratio = signal_to_noise(objective, exact)
    gain = output_gain(objective, exact, torch.zeros(len(exact), 1, 1, 1, dtype=exact.dtype)).flatten()
    of_x0 = ratio.clamp_max(gamma) if kind == "min-SNR" else ratio.sqrt()
    return (of_x0 * gain.square()).float()


def target_variance(objective: Objective, latents: Sequence[Tensor], seed: int, draws: int = 8) -> float:
    """The loss of always predicting the mean target, which the loss is divided by (AC-LoRA Eq. 5 needs 0 < l < 1).

    latents: each (1, channels, ...). The mean is taken per channel. It is 1 for ε-prediction.
    """
    generator = torch.Generator().manual_seed(seed)
    total = squares = torch.zeros(latents[0].shape[1])
    count = 0
    for latent in latents:
        latent = latent.float().cpu().expand(draws, *latent.shape[1:])
        noise = torch.randn(latent.shape, generator=generator)
        sigma = draw_sigmas(objective, draws, generator, latent)
        wanted = target(objective, sigma, objective.add_noise(sigma, noise, latent), latent)
        wanted = wanted.transpose(0, 1).flatten(1)  # (channels, everything else)
        total, squares = total + wanted.sum(1), squares + wanted.square().sum(1)
        count += wanted.shape[1]
    return float((squares / count - (total / count).square()).mean())
