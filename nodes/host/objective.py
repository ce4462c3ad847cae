"""The training objective of ComfyUI's models: what they predict, and how their noise levels are drawn."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import comfy.model_sampling
from torch import Tensor, nn

from ...aclora_core.diffusion import Objective, Sampling

# The prediction of ComfyUI's sampling classes. The first that fits applies, as some derive from others.
_PREDICTIONS = (
    (comfy.model_sampling.EDM, "F of EDM"),
    ((comfy.model_sampling.V_PREDICTION, comfy.model_sampling.V_PREDICTION_DDPM), "v"),
    (comfy.model_sampling.X0, "x0"),
    (comfy.model_sampling.EPS, "ε"),
    ((comfy.model_sampling.CONST, comfy.model_sampling.COSMOS_RFLOW), "the velocity of a flow"),
)
_IMAGE_TO_IMAGE = (comfy.model_sampling.IMG_TO_IMG, comfy.model_sampling.IMG_TO_IMG_FLOW)
_LEAST_ODDS = 2.0  # of the noise levels of flow models; see bench/README.md
_NATIVE_PIXELS = 1024 * 1024  # pixels of an image for which the shift of ComfyUI's flow models is made


def make_objective(sampling: Any, pixels: int = 8) -> Objective:
    """Return how a model adds noise, what it predicts, and how its noise levels are best drawn.

    Timesteps are uniform for most models; for flow models at noise levels of odds 2 at least, as a style lies in what
    is decided first (bench/README.md). They are logit-normal for Flux and its relatives, shifted by the size of the
    image as in their sampling (Esser et al. 2024, arXiv 2403.03206), and for EDM, whose timesteps are uniform in log σ
    (Karras et al. 2022, arXiv 2206.00364, section 5: log σ is normal).

    Args:
        sampling: ComfyUI's model_sampling.
        pixels: along a side of the image, for each pixel of the latent.

    Raises:
        ValueError: the model maps one image to another without noise.
    """
    if isinstance(sampling, _IMAGE_TO_IMAGE):
        raise ValueError(
            "This model turns one image into another in one step, without noise, so a style cannot be trained on it. "
            "Connect a text-to-image model."
        )
    prediction = next((name for kind, name in _PREDICTIONS if isinstance(sampling, kind)), "")
    cosmos = isinstance(sampling, comfy.model_sampling.COSMOS_RFLOW)
    flow = cosmos or isinstance(sampling, comfy.model_sampling.CONST)
    if not prediction:  # a class of another pack
        flow = hasattr(sampling, "shift") or float(sampling.sigma_max) <= 1.0
    log_even = isinstance(sampling, comfy.model_sampling.ModelSamplingContinuousEDM) and not isinstance(
        sampling, comfy.model_sampling.ModelSamplingContinuousV
    )
    by_size = isinstance(sampling, comfy.model_sampling.ModelSamplingFlux)
    logit_normal: Sampling = "shifted" if by_size else "logit-normal"
    uniform_flow = flow and not by_size and not cosmos
    return Objective(
        add_noise=sampling.noise_scaling,
        denoised=sampling.calculate_denoised,
        sigma_at=_sigma_at_cosmos(sampling) if cosmos else _sigma_at(sampling),
        sampling="uniform" if uniform_flow or not (flow or log_even) else logit_normal,
        prediction=prediction or "a target of its own",
        shift_of=_make_shift(sampling, pixels) if flow else None,
        odds=max(1.0, _LEAST_ODDS / _own_shift(sampling)) if uniform_flow else 1.0,
    )


def _own_shift(sampling: Any) -> float:
    """Return the factor on the odds of noise fractions that a flow model's own sampling has, at least 1."""
    return max(1.0, float(getattr(sampling, "shift", 1.0)))


def _sigma_at(sampling: Any) -> Callable[[float], float]:
    """Return the function from the fraction of noise to σ."""
    # The tables may be on the GPU, and reading a number there would wait for all of its queued work.
    table: Any = copy.deepcopy(sampling).cpu() if isinstance(sampling, nn.Module) else sampling
    return lambda fraction: float(table.percent_to_sigma(1.0 - fraction))


def _sigma_at_cosmos(sampling: Any) -> Callable[[float], float]:
    """Return the function from the fraction of noise t to σ, where t = σ / (1 + σ) is the time of the flow."""
    return lambda fraction: min(fraction / (1.0 - fraction), float(sampling.sigma_max))


def _make_shift(sampling: Any, pixels: int) -> Callable[[Tensor], float]:
    """Return the function from a latent to the factor of its noise levels' odds t / (1 - t); 1 at the native size.

    Flux: exp(μ), where μ is linear in the number of tokens, from 0.5 at 256 to 1.15 at 4096, as its authors sample it.
    A node may have set the model to another size already, which shows in a smaller μ. Other models: √(m/n) for m
    instead of n pixels (Esser et al. 2024, arXiv 2403.03206, section 5.3.2).
    """

    def shift_of(latent: Tensor) -> float:
        size = math.prod(latent.shape[-2:]) * pixels**2
        if isinstance(sampling, comfy.model_sampling.ModelSamplingFlux):
            own = min(float(sampling.shift), 1.15)
            return math.exp(1.15 - own + (size - _NATIVE_PIXELS) / 256 * (1.15 - 0.5) / (4096 - 256))
        return math.sqrt(size / _NATIVE_PIXELS)

    return shift_of
