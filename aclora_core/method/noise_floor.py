"""The noise floor of a spectrum: which singular values exceed those of noise, by random-matrix theory.

ScreeNOT of Donoho, Gavish and Romanov 2023 (arXiv 2009.12297), a hard threshold for singular values that estimates the
distribution of the noise from the lower end of the spectrum itself. For white noise it equals the optimal threshold of
Gavish and Donoho 2014 (arXiv 1305.5870).

Trained adapters need such an estimate. Their delta = up · down has `rank` singular values, and these fit no white
matrix: neither a rank × rank one, whose median would give the noise level, nor the lower end of an out × in one. Early
in training the noise has passed through both factors, and its values span orders of magnitude. Late in training they
are the upper edge of the bulk that the noise of the data has, and nearly flat.
"""

from __future__ import annotations

import torch
from torch import Tensor


def count_above_noise(singular_values: Tensor, rows: int, cols: int | Tensor) -> Tensor:
    """Count the singular values above the noise floor.

    The floor is the y with Ψ(y) = y · D'(y) / D(y) = -4, where D is the D-transform of the noise's singular values.
    Ψ increases, so d lies above the floor where Ψ(d) > -4, and the floor itself is never computed.

    ScreeNOT needs an upper bound on the number of signal components; the floor is too high where there are more. The
    bound is a quarter of the components, or just under half where the count under that larger bound exceeds a quarter.
    Below three components there is no noise to estimate, and all positive values count.

    Args:
        singular_values: (..., min(rows, cols)), float64, in descending order, none left out. For a delta of rank r,
            pass r × r: its r × r core has the same singular values.
        cols: One number, or one per spectrum: all at least `rows`, or all at most `rows`.

    Returns:
        (...,), int64.
    """
    count = singular_values.shape[-1]
    if count < 3:
        return (singular_values > 0).sum(-1)
    aspect = count / torch.as_tensor(cols, dtype=torch.float64, device=singular_values.device).clamp_min(rows)
    few, many = max(1, count // 4), (count - 1) // 2
    count_if_few = _count_with_bound(singular_values, few, aspect)
    count_if_many = _count_with_bound(singular_values, many, aspect)
    return torch.where(count_if_many > few, count_if_many, count_if_few)


def _count_with_bound(values: Tensor, max_signal: int, aspect: Tensor) -> Tensor:
    """Count the values above the ScreeNOT threshold, assuming at most `max_signal` signal components."""
    noise = _noise_spectrum(values, max_signal)
    # Values beyond the first max_signal are noise, and lie below its edge.
    candidates = values[..., :max_signal]
    psi = _psi((noise[..., None, :] / candidates[..., :, None]).square(), aspect[..., None])
    return ((candidates > noise[..., :1]) & (psi > -4.0)).sum(-1)


def _noise_spectrum(values: Tensor, max_signal: int) -> Tensor:
    """Replace the first k = max_signal values by an extrapolation of the lower ones.

    z_i = d_{k+1} + (1 - ((i - 1) / k)^⅔) / (2^⅔ - 1) · (d_{k+1} - d_{2k+1}), for i = 1 … k: the shape of a spectrum
    whose density falls to its edge like a square root.
    """
    index = torch.arange(max_signal, dtype=values.dtype, device=values.device)
    weights = (1.0 - (index / max_signal) ** (2 / 3)) / (2 ** (2 / 3) - 1.0)
    edge, lower = values[..., max_signal : max_signal + 1], values[..., 2 * max_signal : 2 * max_signal + 1]
    return torch.cat((edge + weights * (edge - lower), values[..., max_signal:]), dim=-1)


def _psi(squared_ratios: Tensor, aspect: Tensor) -> Tensor:
    """Return Ψ(y) for noise with the singular values z.

    φ(y) = mean of y / (y² - z²) and D = φ · (γφ + (1 - γ) / y). Below, phi is y · φ and derivative is y² · φ', which
    depend on z / y alone.

    Args:
        squared_ratios: (z / y)², (..., count).
        aspect: γ, the shorter side of the matrix over the longer.
    """
    inverse = 1.0 / (1.0 - squared_ratios)
    phi = inverse.mean(-1)
    derivative = -((1.0 + squared_ratios) * inverse.square()).mean(-1)
    return derivative / phi + (aspect * derivative - (1.0 - aspect)) / (aspect * phi + (1.0 - aspect))
