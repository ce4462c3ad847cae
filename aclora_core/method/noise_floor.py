"""Where noise ends among the singular values of a matrix, by random-matrix theory.

The noise level known: the optimal hard threshold of Gavish and Donoho 2014 (arXiv 1305.5870) for white noise.

Not known: ScreeNOT of Donoho, Gavish and Romanov 2023 (arXiv 2009.12297), which reads the noise's own distribution off
the lower singular values. The weights of a trained adapter need that. Its delta = up · down has `rank` values, and they
are neither those of a white rank × rank matrix, whose median would give the level, nor the lower part of a white
out × in matrix: early in a training the noise went through both factors and its values differ by orders of magnitude,
late it is the upper end of the bulk that the data's noise has, and nearly flat.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .batched_eigh import to_float64

# The interval that holds the floor is cut in 16 pieces six times: to 4e-8 of the noise's edge, as float32 spectra are.
_PIECES, _ROUNDS = 16, 6


def noise_floor(singular_values: Tensor, rows: int, cols: int, noise: float | None = None) -> Tensor:
    """The singular value above which components are signal.

    With the noise known (standard deviation of an entry): λ(β) · √(long side) · noise. Else ScreeNOT: the y at which
    Ψ(y) = y · D'(y) / D(y) = -4, D the D-transform of the noise's singular values. For white noise both are the same.

    How many components are signal at most must be assumed: a quarter, or, where the rule finds more than these in
    assuming fewer than half, fewer than half. With more than that the floor is too high. Of fewer than three components
    none can be told to be noise, so the floor is 0.

    singular_values: (..., min(rows, cols)), sorted downwards. For a delta of rank r pass r × r: its core has all its
    values, and the layer's size plays no part. Returns (...,), float64.

    Raises:
        ValueError: the noise is negative, or not all singular values are given.
    """
    if noise is not None:
        if not noise >= 0.0:
            raise ValueError(f"The noise level must be 0 or more, but is {noise}.")
        level = hard_threshold_factor(rows, cols) * math.sqrt(max(rows, cols)) * noise
        return torch.full(singular_values.shape[:-1], level, dtype=torch.float64, device=singular_values.device)
    values, count = to_float64(singular_values), min(rows, cols)
    if values.shape[-1] != count:
        raise ValueError(
            f"The noise floor of a {rows} × {cols} matrix needs all its {count} singular values, but there"
            f" are {values.shape[-1]}. For a delta of rank r pass r × r, or give the noise level."
        )
    if count < 3:
        return values.new_zeros(values.shape[:-1])
    few, many = _assumed(count)
    if_few, if_many = (_screenot(_without_signal(values, most), count / max(rows, cols)) for most in (few, many))
    return torch.where((values > if_many[..., None]).sum(-1) > few, if_many, if_few)


def count_above_noise(singular_values: Tensor, rows: int, cols: int | Tensor) -> Tensor:
    """How many of the values lie above their noise_floor, in one step: Ψ rises, so these are the d with Ψ(d) > -4.

    singular_values: (..., min(rows, cols)), float64, sorted downwards. cols: one number, or one for each spectrum, all
    of them at least `rows`, or all at most as many. Returns (...,), int64.
    """
    count = singular_values.shape[-1]
    if count < 3:
        return (singular_values > 0).sum(-1)
    aspect = count / torch.as_tensor(cols, dtype=torch.float64, device=singular_values.device).clamp_min(rows)
    few, many = _assumed(count)
    if_few, if_many = (_count_above(singular_values, most, aspect) for most in (few, many))
    return torch.where(if_many > few, if_many, if_few)


def hard_threshold_factor(rows: int, cols: int) -> float:
    """λ(β) of Gavish and Donoho 2014 for the noise level 1, β = short / long side; 4 / √3 for a square matrix.

    λ(β) = √(2(β + 1) + 8β / (β + 1 + √(β² + 14β + 1)))
    """
    beta = min(rows, cols) / max(rows, cols)
    return math.sqrt(2.0 * (beta + 1.0) + 8.0 * beta / (beta + 1.0 + math.sqrt(beta * beta + 14.0 * beta + 1.0)))


def _assumed(count: int) -> tuple[int, int]:
    """How many of so many components are signal at most, assumed at first, and assumed where these are too few."""
    return max(1, count // 4), (count - 1) // 2


def _without_signal(values: Tensor, most: int) -> Tensor:
    """The noise's singular values, where the first `most` may be signal: these are drawn on from the ones below them.

    z_i = d_{k+1} + (1 - ((i - 1) / k)^⅔) / (2^⅔ - 1) · (d_{k+1} - d_{2k+1}), as a spectrum does whose density falls to
    its edge like a square root.
    """
    places = torch.arange(most, dtype=values.dtype, device=values.device)
    steps = (1.0 - (places / most) ** (2 / 3)) / (2 ** (2 / 3) - 1.0)
    last, lower = values[..., most : most + 1], values[..., 2 * most : 2 * most + 1]
    return torch.cat((last + steps * (last - lower), values[..., most:]), dim=-1)


def _screenot(bulk: Tensor, aspect: float) -> Tensor:
    """The threshold of ScreeNOT for noise with these singular values: the y with Ψ(y) = -4. Zero noise has 0.

    Ψ rises from -∞ at the edge z₁; for values that are all equal and γ = 1 it reaches -4 at √3 · z₁, for all others
    before. bulk: (..., count); returns (...,).
    """
    edge = bulk[..., :1]
    squares = (bulk / torch.where(edge > 0, edge, 1.0)).square()[..., None, :]
    low, width = torch.ones_like(bulk[..., 0]), math.sqrt(3.0) - 1.0
    steps = torch.arange(1, _PIECES, dtype=bulk.dtype, device=bulk.device)
    for _ in range(_ROUNDS):
        width /= _PIECES
        points = low[..., None] + width * steps
        low = low + width * (_psi(squares / points.square()[..., None], aspect) < -4.0).sum(-1)
    return (low + width) * edge[..., 0]


def _count_above(values: Tensor, most: int, aspect: Tensor) -> Tensor:
    """How many values lie above the threshold of ScreeNOT, where the first `most` may be signal."""
    bulk = _without_signal(values, most)
    # All others are noise, and lie below its edge.
    values = values[..., :most]
    psi = _psi((bulk[..., None, :] / values[..., :, None]).square(), aspect[..., None])
    return ((values > bulk[..., :1]) & (psi > -4.0)).sum(-1)


def _psi(squares: Tensor, aspect: float | Tensor) -> Tensor:
    """Ψ(y) for noise with the values z, given (z / y)²: (..., count). aspect: γ, the shorter side over the longer.

    φ(y) = mean of y / (y² - z²), D = φ · (γφ + (1 - γ) / y); below it is y · φ and y² · φ', which need only z / y.
    """
    near = 1.0 / (1.0 - squares)
    phi, slope = near.mean(-1), -((1.0 + squares) * near.square()).mean(-1)
    return slope / phi + (aspect * slope - (1.0 - aspect)) / (aspect * phi + (1.0 - aspect))
