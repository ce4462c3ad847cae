"""Rules that choose a rank from singular values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from .noise_floor import noise_floor
from .spectrum import checked_values, relative


def rank_fixed(singular_values: Tensor, rank: float) -> int:
    """The given rank, 1 or more, or all that there is."""
    if not rank >= 1:
        raise ValueError(f"The rank to keep must be at least 1, but is {rank}.")
    return _within(int(min(rank, len(singular_values))), singular_values)


def rank_by_ratio(singular_values: Tensor, ratio: float) -> int:
    """Number of d_i > ratio · d₁, 0 <= ratio < 1. (Tools that ask for d_i > d₁ / p mean ratio = 1 / p.)"""
    if not 0.0 <= ratio < 1.0:
        raise ValueError(f"The ratio to the largest singular value must be from 0 to below 1, but is {ratio}.")
    return _within(int((relative(singular_values) > ratio).sum()), singular_values)


def rank_by_sum(singular_values: Tensor, keep: float) -> int:
    """Smallest k with (d₁ + … + d_k) / Σd >= keep, 0 < keep <= 1."""
    return _smallest_reaching(relative(singular_values), keep)


def rank_by_energy(singular_values: Tensor, keep: float) -> int:
    """Smallest k with (d₁² + … + d_k²) / Σd² >= keep, 0 < keep <= 1."""
    return _smallest_reaching(relative(singular_values).square(), keep)


def rank_by_frobenius(singular_values: Tensor, keep: float) -> int:
    """Smallest k with √((d₁² + … + d_k²) / Σd²) >= keep: the share of the Frobenius norm, so energy at keep²."""
    _check_share(keep)
    return rank_by_energy(singular_values, keep * keep)


def rank_by_threshold(singular_values: Tensor, threshold: float) -> int:
    """Number of d_i > threshold, an absolute size, 0 or more."""
    if not threshold >= 0.0:
        raise ValueError(f"The smallest singular value to keep must be 0 or more, but is {threshold}.")
    return _within(int((checked_values(singular_values) > threshold).sum()), singular_values)


def rank_by_knee(singular_values: Tensor) -> int:
    """Components before the knee, where the spectrum lies deepest below the line from its first to its last value.

    Spectra fall steeply, then flatten, so they sag below that line (Kneedle, Satopää et al. 2011, for convex curves).
    The point itself is the first of the flat part and is not kept. A spectrum without a sag keeps everything.
    """
    values = relative(singular_values)
    count = len(values)
    drop = float(values[0] - values[-1])
    if drop == 0.0 or count < 3:
        return count if float(values[0]) > 0.0 else 1
    height = (values - values[-1]) / drop
    sag = torch.linspace(1.0, 0.0, count, dtype=values.dtype, device=values.device) - height
    deepest = int(sag.argmax())
    # A straight line sags by rounding only.
    return _within(deepest, singular_values) if float(sag[deepest]) > 1e-6 else count


def rank_by_noise_floor(singular_values: Tensor, rows: int, cols: int, noise: float | None = None) -> int:
    """Number of singular values above noise_floor; for a delta of rank r, rows and cols are r."""
    return rank_by_threshold(singular_values, float(noise_floor(checked_values(singular_values), rows, cols, noise)))


def _smallest_reaching(weights: Tensor, keep: float) -> int:
    _check_share(keep)
    reached = weights.cumsum(0)
    # The number of sums that fall short is one less than the count that does not: the + 1 stands here and nowhere else.
    return _within(int((reached < keep * reached[-1]).sum()) + 1, weights)


def _check_share(keep: float) -> None:
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"The share to keep must be above 0 and at most 1, but is {keep}.")


def _within(rank: int, singular_values: Tensor) -> int:
    return max(1, min(rank, len(singular_values)))


RuleName = Literal["fixed", "ratio", "sum", "energy", "frobenius", "threshold", "knee", "noise_floor"]


Rule = Callable[[Tensor], int]


def rank_rule(name: RuleName, value: float = 0.0) -> Rule:
    """The rule of that name (rank_by_…) with its parameter; "knee" and "noise_floor" have none.

    Raises:
        ValueError: there is no such rule. A parameter outside its range is refused when the rule is first used.
    """
    rules: dict[str, Rule] = {
        "fixed": lambda values: rank_fixed(values, value),
        "ratio": lambda values: rank_by_ratio(values, value),
        "sum": lambda values: rank_by_sum(values, value),
        "energy": lambda values: rank_by_energy(values, value),
        "frobenius": lambda values: rank_by_frobenius(values, value),
        "threshold": lambda values: rank_by_threshold(values, value),
        "knee": rank_by_knee,
        # A delta's values are all the values of its core, which is square.
        "noise_floor": lambda values: rank_by_noise_floor(values, len(values), len(values)),
    }
    if name not in rules:
        raise ValueError(f"The rank rule must be one of {', '.join(get_args(RuleName))}, but is '{name}'.")
    return rules[name]
