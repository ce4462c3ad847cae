"""The noise of the host's models: what they predict, and which noise levels they learn best from."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import comfy.model_sampling
from torch import Tensor, nn

from ...aclora_core.diffusion import Objective, Sampling

# What the host's classes predict; the first that fits counts, as some derive from others.
_PREDICTIONS = (
    (comfy.model_sampling.EDM, "F of EDM"),
    ((comfy.model_sampling.V_PREDICTION, comfy.model_sampling.V_PREDICTION_DDPM), "v"),
    (comfy.model_sampling.X0, "x0"),
    (comfy.model_sampling.EPS, "ε"),
    ((comfy.model_sampling.CONST, comfy.model_sampling.COSMOS_RFLOW), "the velocity of a flow"),
)
_PICTURES_TO_PICTURES = (comfy.model_sampling.IMG_TO_IMG, comfy.model_sampling.IMG_TO_IMG_FLOW)
_NATIVE = 1024 * 1024  # pixels that the shift of the host's flow models is made for


def objective_of(sampling: Any, pixels: int = 8) -> Objective:
    """The model's noise. sampling: the host's model_sampling; pixels: along a side, for each one of a latent.

    Noise levels are drawn as the kind of model was made: around the middle for flows (Esser et al. 2024) and for EDM,
    whose way is even in log σ (Karras et al. 2022, arXiv 2206.00364, section 5: log σ is normal); evenly for others.
    Flux and its kin, which are drawn with more noise the larger the picture is, learn so too.

    Raises:
        ValueError: the model turns one picture into another, and learns nothing by taking noise off.
    """
    if isinstance(sampling, _PICTURES_TO_PICTURES):
        raise ValueError(
            "This model turns one picture into another in one step, without noise, so a style cannot be trained on it. "
            "Connect a model that draws from text."
        )
    prediction = next((name for kind, name in _PREDICTIONS if isinstance(sampling, kind)), "")
    cosmos = isinstance(sampling, comfy.model_sampling.COSMOS_RFLOW)
    flow = cosmos or isinstance(sampling, comfy.model_sampling.CONST)
    if not prediction:  # another pack's own
        flow = hasattr(sampling, "shift") or float(sampling.sigma_max) <= 1.0
    log_even = isinstance(sampling, comfy.model_sampling.ModelSamplingContinuousEDM) and not isinstance(
        sampling, comfy.model_sampling.ModelSamplingContinuousV
    )
    by_size = isinstance(sampling, comfy.model_sampling.ModelSamplingFlux)
    around_the_middle: Sampling = "shifted" if by_size else "logit-normal"
    return Objective(
        add_noise=sampling.noise_scaling,
        denoised=sampling.calculate_denoised,
        sigma_at=_share_of_cosmos(sampling) if cosmos else _share_of(sampling),
        sampling=around_the_middle if flow or log_even else "uniform",
        prediction=prediction or "a target of its own",
        shift_of=_shift_of(sampling, pixels) if flow else None,
    )


def _share_of(sampling: Any) -> Callable[[float], float]:
    # Its tables may lie on the GPU, and to read one number there is to wait until the GPU has done all that it has to.
    table: Any = copy.deepcopy(sampling).cpu() if isinstance(sampling, nn.Module) else sampling
    return lambda share: float(table.percent_to_sigma(1.0 - share))


def _share_of_cosmos(sampling: Any) -> Callable[[float], float]:
    """The host counts these levels by σ; the share of noise is σ / (1 + σ), the time of the flow."""
    return lambda share: min(share / (1.0 - share), float(sampling.sigma_max))


def _shift_of(sampling: Any, pixels: int) -> Callable[[Tensor], float]:
    """What to multiply the odds of a latent's noise levels with, by its size; 1 at the model's own.

    Flux: exp μ, with μ along a line from 0.5 at 256 tokens to 1.15 at 4096, as its authors sample it. A node may have
    set the model to another size already, which shows in a smaller μ. Others: √(m/n) for m instead of n pixels (Esser
    et al. 2024, arXiv 2403.03206, section 5.3.2).
    """

    def shift_of(latent: Tensor) -> float:
        size = math.prod(latent.shape[-2:]) * pixels**2
        if isinstance(sampling, comfy.model_sampling.ModelSamplingFlux):
            own = min(float(sampling.shift), 1.15)
            return math.exp(1.15 - own + (size - _NATIVE) / 256 * (1.15 - 0.5) / (4096 - 256))
        return math.sqrt(size / _NATIVE)

    return shift_of
