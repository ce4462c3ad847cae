"""AC-LoRA (Cui et al., arXiv 2504.02231) on one screen: Eq. 2, 3, 5 and 6 for one matrix and for one layer.

Every E epochs (E = 10 in the paper), each factor M of a LoRA layer is split by its SVD, M = U diag(d) Vᵀ. The leading
components are signal and stay. The others are noise: they are replaced by Gaussian noise of the same variance.

Restarts are off by default (TrainConfig.mode): judged by generated images, restarts every 10 epochs (40 steps) make a
style worse, and one after some 320 steps makes it neither better nor worse. Where they are switched on, the defaults
depart from the paper in three points:
- They come every 80 epochs.
- No restart in the last interval (is_restart_epoch), so that the saved weights hold no untrained noise.
- Optimizer moments of redrawn factors are cleared: they describe weights that are gone.

Training uses restart.py: the same for all layers at once, from Gram matrices. A test holds it to this file over
thousands of random matrices: in 32 bits and fewer the weights are the same, but for the last bit of a rare one. Where
equal singular values lie on both sides of the split, the paper leaves open which of their directions is signal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .batched_eigh import to_float64
from .resampling import NEGLIGIBLE_NOISE, standard_normal
from .spectrum import relative
from .thresholds import Measure, check_finite, check_measure, check_schedule, check_share


def signal_count(singular_values: Tensor, threshold: float, measure: Measure = "energy") -> int:
    """Count the singular values that are signal (AC-LoRA Eq. 3), at least 1.

    #{ i : w_1 + … + w_i < threshold · Σ w }, strictly, with w = d² for the measure "energy" and w = d for "sum".

    Args:
        singular_values: (k,), in descending order.
        threshold: p, the share of Σ w that is signal, from 0 to 1.

    Raises:
        ValueError: The threshold or the measure is invalid, or the spectrum is empty or not finite.
    """
    check_share(threshold)
    check_measure(measure)
    d = relative(singular_values)  # d / d_1, float64
    cumulative = (d.square() if measure == "energy" else d).cumsum(0)
    return max(1, int((cumulative < threshold * cumulative[-1]).sum()))


def dynamic_threshold(
    loss: float, epoch: float, total_epochs: float, minimum: float = 0.0, maximum: float = 1.0
) -> float:
    """Return the threshold p = 1 - loss^α (AC-LoRA Eq. 5), α = 1 + epoch / total_epochs (Eq. 6), clamped.

    Args:
        loss: Mean training loss since the last restart, over the loss of predicting the mean target.
        minimum, maximum: Bounds of the result, within 0 to 1.

    Raises:
        ValueError: The loss is negative or not finite, or another argument is out of range.
    """
    check_schedule(loss, epoch, total_epochs, minimum, maximum)
    alpha = 1.0 + epoch / total_epochs
    threshold = 1.0 - min(loss, 1.0) ** alpha
    return min(max(threshold, minimum), maximum)


def restart_matrix(
    matrix: Tensor, threshold: float, generator: torch.Generator, measure: Measure = "energy"
) -> tuple[Tensor, int]:
    """Keep the signal of a matrix and redraw its noise (AC-LoRA Eq. 2).

    M_signal = U diag(d on the signal, 0 elsewhere) Vᵀ, and M becomes M_signal + G with G ~ N(0, σ²) elementwise and
    σ² = Var(M - M_signal). A matrix without noise is returned unchanged.

    Args:
        matrix: (rows, cols), or (rows, in, kh, kw) of a convolution. It is not modified.
        threshold: p, the share of the spectrum that is signal, from 0 to 1.

    Returns:
        The new matrix, in the shape, type and device of the input, and the number of components kept.

    Raises:
        ValueError: The matrix holds NaN or infinity, or the threshold or the measure is invalid.
    """
    check_finite(matrix)
    m = to_float64(matrix.flatten(1))
    noise = standard_normal(m, generator)
    u, d, vh = torch.linalg.svd(m, full_matrices=False)
    n_signal = signal_count(d, threshold, measure)
    signal = (u[:, :n_signal] * d[:n_signal]) @ vh[:n_signal]
    variance = (m - signal).var(correction=0)
    if not variance > NEGLIGIBLE_NOISE * m.square().mean():
        return matrix.detach().clone(), n_signal
    new = signal + variance.sqrt() * noise
    return new.reshape(matrix.shape).to(matrix).contiguous(), n_signal


def restart_layer(
    lora_down: Tensor, lora_up: Tensor, loss: float, epoch: float, total_epochs: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Restart one layer as the paper does every E epochs, each factor by itself (AC-LoRA Eq. 2, 3, 5 and 6).

    Args:
        lora_down: (rank, in), or (rank, in, kh, kw) of a convolution.
        lora_up: (out, rank) or (out, rank, 1, 1).
        loss, epoch, total_epochs: As for dynamic_threshold.

    Returns:
        The new lora_down and lora_up. The inputs are not modified.

    Raises:
        ValueError: As for dynamic_threshold and restart_matrix.
    """
    threshold = dynamic_threshold(loss, epoch, total_epochs)
    new_down, _ = restart_matrix(lora_down, threshold, generator)
    new_up, _ = restart_matrix(lora_up.flatten(1).mT, threshold, generator)
    return new_down, new_up.mT.reshape(lora_up.shape).contiguous()
