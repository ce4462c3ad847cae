"""Standard error of a measure over images, by the jackknife."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GROUPS = 32  # at most; images beyond are left out several at once, which bounds the work
_LEAST = 3  # rows; a distance within a set needs two that are left


@dataclass(frozen=True)
class Estimate:
    """A measure and how much it would vary with other images of the same kind."""

    value: float
    error: float | None = None  # standard error; None: there are too few images to tell


def estimate(measure: Callable[..., float], *sets: Tensor) -> Estimate:
    """Return a measure of sets of images with its standard error.

    The jackknife leaves out each image in turn and looks how much the measure changes (Efron and Stein 1981, Annals of
    Statistics 9). Unlike the bootstrap it draws no image twice, which a distance within a set would take for two images
    that are alike. The sets are independent, so their variances add up.

    Args:
        measure: of the sets, in this order.
        sets: tensors with a row for each image. Rows that belong together, as of one prompt, are one row of one tensor.
    """
    variances = [_variance(measure, sets, place) for place in range(len(sets))]
    known = [each for each in variances if each is not None]
    return Estimate(measure(*sets), math.sqrt(sum(known)) if len(known) == len(sets) else None)


def difference(first: Estimate, second: Estimate) -> Estimate:
    """Return first - second of two independent estimates."""
    if first.error is None or second.error is None:
        return Estimate(first.value - second.value)
    return Estimate(first.value - second.value, math.hypot(first.error, second.error))


def _variance(measure: Callable[..., float], sets: Sequence[Tensor], place: int) -> float | None:
    """Return the jackknife variance of one set: (g - 1) / g Σ (θᵢ - mean θ)² over g groups that are left out."""
    rows = sets[place]
    groups = min(len(rows), GROUPS)
    if groups < _LEAST:
        return None
    group = torch.arange(len(rows), device=rows.device) % groups
    kept = (rows[group != left_out] for left_out in range(groups))
    found = [measure(*sets[:place], part, *sets[place + 1 :]) for part in kept]
    values = torch.tensor(found, dtype=torch.float64)
    return (groups - 1) / groups * (values - values.mean()).square().sum().item()
