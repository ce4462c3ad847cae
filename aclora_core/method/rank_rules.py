"""Rules that choose a rank from the singular values of a delta.

Each rule takes singular values in descending order and returns how many to keep: at least 1, at most all. All raise
ValueError if the spectrum is empty or not finite, or the rule's parameter is out of range.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from .noise_floor import count_above_noise
from .spectrum import checked_values, relative

RuleName = Literal["fixed", "ratio", "sum", "energy", "frobenius", "threshold", "knee", "noise_floor"]

Rule = Callable[[Tensor], int]


def rank_rule(name: RuleName, value: float = 0.0) -> Rule:
    """Return the rule of that name, rank_by_<name>, with its parameter bound; "knee" and "noise_floor" have none.

    Raises:
        ValueError: The name is unknown. A parameter out of range is refused when the rule is first used.
    """
    rules: dict[str, Rule] = {
        "fixed": lambda values: rank_fixed(values, value),
        "ratio": lambda values: rank_by_ratio(values, value),
        "sum": lambda values: rank_by_sum(values, value),
        "energy": lambda values: rank_by_energy(values, value),
        "frobenius": lambda values: rank_by_frobenius(values, value),
        "threshold": lambda values: rank_by_threshold(values, value),
        "knee": rank_by_knee,
        # The core of a delta is square, and has as many singular values as the delta.
        "noise_floor": lambda values: rank_by_noise_floor(values, len(values), len(values)),
    }
    if name not in rules:
        raise ValueError(f"The rank rule must be one of {', '.join(get_args(RuleName))}, but is '{name}'.")
    return rules[name]


def rank_fixed(singular_values: Tensor, rank: float) -> int:
    """Return the given rank, 1 or more, or the number of values if there are fewer."""
    if not rank >= 1:
        raise ValueError(f"The rank to keep must be at least 1, but is {rank}.")
    return _clamp_rank(int(min(rank, len(singular_values))), singular_values)


def rank_by_ratio(singular_values: Tensor, ratio: float) -> int:
    """Count d_i > ratio · d₁, with 0 <= ratio < 1. Tools that ask for d_i > d₁ / p mean ratio = 1 / p."""
    if not 0.0 <= ratio < 1.0:
        raise ValueError(f"The ratio to the largest singular value must be from 0 to below 1, but is {ratio}.")
    return _clamp_rank(int((relative(singular_values) > ratio).sum()), singular_values)


def rank_by_sum(singular_values: Tensor, keep: float) -> int:
    """Return the smallest k with (d₁ + … + d_k) / Σd >= keep, with 0 < keep <= 1."""
    return _smallest_reaching(relative(singular_values), keep)


def rank_by_energy(singular_values: Tensor, keep: float) -> int:
    """Return the smallest k with (d₁² + … + d_k²) / Σd² >= keep, with 0 < keep <= 1."""
    return _smallest_reaching(relative(singular_values).square(), keep)


def rank_by_frobenius(singular_values: Tensor, keep: float) -> int:
    """Return the smallest k that keeps a share of the Frobenius norm: √((d₁² + … + d_k²) / Σd²) >= keep.

    This is rank_by_energy at keep².
    """
    _check_share(keep)
    return rank_by_energy(singular_values, keep * keep)


def rank_by_threshold(singular_values: Tensor, threshold: float) -> int:
    """Count d_i > threshold, an absolute value of at least 0."""
    if not threshold >= 0.0:
        raise ValueError(f"The smallest singular value to keep must be 0 or more, but is {threshold}.")
    return _clamp_rank(int((checked_values(singular_values) > threshold).sum()), singular_values)


def rank_by_knee(singular_values: Tensor) -> int:
    """Count the components before the knee: the point farthest below the line from the first to the last value.

    Spectra fall steeply, then flatten, so they sag below that line (Kneedle, Satopää et al. 2011, for convex curves).
    The knee itself is the first point of the flat part and is not kept. A spectrum without a sag is kept whole.
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
    return _clamp_rank(deepest, singular_values) if float(sag[deepest]) > 1e-6 else count


def rank_by_noise_floor(singular_values: Tensor, rows: int, cols: int) -> int:
    """Count the singular values above the noise floor (noise_floor.py).

    Args:
        singular_values: All min(rows, cols) of them.
        rows, cols: Shape of the matrix; for a delta of rank r, both are r.
    """
    values = checked_values(singular_values)
    if len(values) != min(rows, cols):
        raise ValueError(
            f"The noise floor of a {rows} × {cols} matrix needs all its {min(rows, cols)} singular values, but there"
            f" are {len(values)}. For a delta of rank r, pass r × r."
        )
    return _clamp_rank(int(count_above_noise(values, rows, cols)), values)


def _smallest_reaching(weights: Tensor, keep: float) -> int:
    _check_share(keep)
    cumulative = weights.cumsum(0)
    # One more than the number of sums that fall short of the share.
    return _clamp_rank(int((cumulative < keep * cumulative[-1]).sum()) + 1, weights)


def _check_share(keep: float) -> None:
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"The share to keep must be above 0 and at most 1, but is {keep}.")


def _clamp_rank(rank: int, singular_values: Tensor) -> int:
    return max(1, min(rank, len(singular_values)))
