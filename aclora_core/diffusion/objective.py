"""The noise of a diffusion model: how it is added, at which levels training draws it, and the model's own target.

Everything follows from three functions of the model: how it adds noise, how it turns its raw output into the clean
latent (x0), and which noise level sigma belongs to a noise fraction t between 0 (clean) and 1 (noise alone). Nothing
here asks what the model predicts: x0 is linear in the raw output, so two calls give its slope c_out.
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
    """A model's noise process. sigma is (n,); noise, latents and outputs are (n, channels, ...)."""

    add_noise: Callable[[Tensor, Tensor, Tensor], Tensor]  # sigma, noise, latent -> noisy
    denoised: Callable[[Tensor, Tensor, Tensor], Tensor]  # sigma, raw output, noisy -> x0
    sigma_at: Callable[[float], float]  # noise fraction t in 0..1 -> sigma
    sampling: Sampling  # how noise fractions are drawn
    prediction: str = "a target of its own"  # what the model predicts, in a word
    # For flow models: latent -> the factor on the odds t / (1 - t), which follows from the size of the latent.
    shift_of: Callable[[Tensor], float] | None = None
    odds: float = 1.0  # factor on the odds of every noise fraction that is drawn; above 1 there is more noise


def with_timesteps(objective: Objective, wanted: Timesteps, shift: float = 1.0) -> Objective:
    """Return the objective with timesteps drawn as asked for; "automatic" keeps the model's own choice.

    Args:
        objective: the model's own.
        wanted: how noise fractions are drawn.
        shift: factor on the odds t / (1 - t) of every noise fraction t that is drawn, above 1 for more noise; on top
            of the model's own where timesteps are automatic.

    Raises:
        ValueError: "shifted" was asked of a model that is no flow model.
    """
    if wanted == "automatic":
        return objective if shift == 1 else replace(objective, odds=shift * objective.odds)
    if wanted == "shifted" and objective.shift_of is None:
        raise ValueError(
            f"Shifted timesteps need a flow model, but this model predicts {objective.prediction}. Set timesteps to "
            "automatic."
        )
    return replace(objective, sampling=wanted, odds=shift)


def draw_sigmas(objective: Objective, count: int, generator: torch.Generator, latent: Tensor | None = None) -> Tensor:
    """Draw noise levels, (count,), float32, from a generator on the CPU.

    "uniform": t is uniform. "logit-normal": t is the sigmoid of a standard normal, so that the middle comes most often
    (Esser et al. 2024, arXiv 2403.03206, section 3.1). "shifted": the same with the odds of t multiplied by a factor
    for the size of the latent, since a larger image takes more noise to hide as much (section 5.3.2).

    Raises:
        ValueError: objective.sampling is none of these.
    """
    _check_sampling(objective)
    if objective.sampling == "uniform":
        return _sigmas(objective, torch.rand(count, generator=generator))
    return _sigmas(objective, _fractions(objective, torch.randn(count, generator=generator), latent))


def sigmas_at_quantiles(objective: Objective, quantiles: Tensor, latent: Tensor | None = None) -> Tensor:
    """Return the noise levels below which these shares of all levels lie that draw_sigmas draws, (n,), float32.

    Args:
        objective: what the model predicts.
        quantiles: (n,), shares between 0 and 1.
        latent: of the images, whose size matters where timesteps are shifted.

    Raises:
        ValueError: objective.sampling is unknown.
    """
    _check_sampling(objective)
    if objective.sampling == "uniform":
        return _sigmas(objective, quantiles)
    normal = torch.special.ndtri(quantiles.double()).float()
    return _sigmas(objective, _fractions(objective, normal, latent))


def stratified_quantiles(count: int, generator: torch.Generator) -> Tensor:
    """Draw one uniform number in each of `count` equal parts of 0 to 1, in random order, (count,).

    Each number alone is uniform. Their mean varies less than that of independent draws, and so does a gradient over
    the noise levels at these quantiles. Kingma et al. 2021 (arXiv 2107.00630) use such a low-discrepancy sampler for
    diffusion models, where all parts share one draw.
    """
    order = torch.randperm(count, generator=generator)
    return (order + torch.rand(count, generator=generator)) / count


def _check_sampling(objective: Objective) -> None:
    if objective.sampling not in get_args(Sampling):
        *others, last = get_args(Sampling)
        raise ValueError(f"Timesteps are drawn {', '.join(others)} or {last}, not '{objective.sampling}'.")


def _fractions(objective: Objective, normal: Tensor, latent: Tensor | None) -> Tensor:
    """Return the noise fractions that belong to standard normal numbers, where sampling is not uniform."""
    if objective.sampling == "shifted" and objective.shift_of and latent is not None:
        normal = normal + math.log(objective.shift_of(latent))
    return torch.sigmoid(normal)


def _sigmas(objective: Objective, fractions: Tensor) -> Tensor:
    if objective.odds != 1:
        fractions = objective.odds * fractions / (1 + (objective.odds - 1) * fractions)
    # Not the ends: at t = 0 there is nothing to predict, and a host may map t = 1 to infinity.
    return torch.tensor([objective.sigma_at(fraction) for fraction in fractions.clamp(1e-3, 1 - 1e-3).tolist()])


def c_out(objective: Objective, sigma: Tensor, noisy: Tensor) -> Tensor:
    """Return ∂x0 / ∂output of each element, in the shape of noisy (c_out of Karras et al. 2022, arXiv 2206.00364)."""
    zero = torch.zeros_like(noisy)
    return objective.denoised(sigma, zero + 1, noisy) - objective.denoised(sigma, zero, noisy)


def prediction_target(objective: Objective, sigma: Tensor, noisy: Tensor, latent: Tensor) -> Tensor:
    """Return the raw output that would be right: ε, v, flow velocity or x0, whichever the model predicts."""
    nothing = torch.zeros_like(noisy)
    zero = objective.denoised(sigma, nothing, noisy)
    slope = objective.denoised(sigma, nothing + 1, noisy) - zero  # c_out, which would compute zero again
    return (latent - zero) / slope


def snr(objective: Objective, sigma: Tensor) -> Tensor:
    """Return the signal-to-noise ratio of the noisy latents, (n,), for latents of variance 1."""
    nothing = torch.zeros(len(sigma), 1, 1, 1, dtype=sigma.dtype)
    signal = objective.add_noise(sigma, nothing, nothing + 1)
    noise = objective.add_noise(sigma, nothing + 1, nothing)
    return (signal / noise).square().flatten()


def loss_weights(objective: Objective, sigma: Tensor, kind: LossWeighting, gamma: float) -> Tensor | None:
    """Return the loss weight of each noise level, (n,), float32; None where all count 1.

    With r the signal-to-noise ratio, a weight w of the error of x0 is w · c_out² of the error of the raw output.
    "min-SNR": w = min(r, γ) (Hang et al. 2023, arXiv 2303.09556), so min(r, γ) / r for ε and
    min(r, γ) / (r + 1) for v. "debiased": w = √r, so 1 / √r for ε (Yu et al. 2023, arXiv 2310.08442).

    Args:
        objective: what the model predicts.
        sigma: (n,), noise levels, on the CPU.
        kind: "none", "min-SNR" or "debiased".
        gamma: γ of min-SNR.
    """
    if kind == "none":
        return None
    exact = sigma.double()
    ratio = snr(objective, exact)
    gain = c_out(objective, exact, torch.zeros(len(exact), 1, 1, 1, dtype=exact.dtype)).flatten()
    of_x0 = ratio.clamp_max(gamma) if kind == "min-SNR" else ratio.sqrt()
    return (of_x0 * gain.square()).float()


def target_variance(objective: Objective, latents: Sequence[Tensor], seed: int, draws: int = 8) -> float:
    """Return the loss of always predicting the mean target; it is 1 for ε-prediction.

    Reported losses are divided by it, as AC-LoRA Eq. 5 needs 0 < l < 1.

    Args:
        objective: what the model predicts.
        latents: each (1, channels, ...); the mean target is taken per channel.
        seed: of the noise and the noise levels.
        draws: how many per latent.
    """
    generator = torch.Generator().manual_seed(seed)
    total = squares = torch.zeros(latents[0].shape[1])
    count = 0
    for latent in latents:
        targets = _draw_targets(objective, latent.float().cpu(), draws, generator)
        count += targets.shape[1]
        total = total + targets.sum(1)
        squares = squares + targets.square_().sum(1)
    return float((squares / count - (total / count).square()).mean())


def _draw_targets(objective: Objective, latent: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Return the targets of one latent for drawn noise at drawn noise levels, (channels, everything else).

    One draw at a time, so that what comes in between stays in the cache and needs no fresh memory.
    """
    noise = torch.randn((draws, *latent.shape[1:]), generator=generator)
    sigmas = draw_sigmas(objective, draws, generator, latent)
    targets = []
    for sigma, drawn in zip(sigmas.split(1), noise.split(1), strict=True):
        target = prediction_target(objective, sigma, objective.add_noise(sigma, drawn, latent), latent)
        targets.append(target.squeeze(0).flatten(1))
    return torch.cat(targets, 1)
