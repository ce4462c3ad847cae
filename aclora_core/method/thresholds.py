"""How many singular values are signal (AC-LoRA Eq. 3, 5 and 6), and when to restart."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from .batched_eigh import to_float64
from .noise_floor import count_above_noise

Measure = Literal["energy", "sum"]  # cumulative share of d² or of d


def signal_count(singular_values: Tensor, threshold: float, measure: Measure = "energy") -> int:
    """Number of components that are signal (AC-LoRA Eq. 3), never under 1.

    #{ i : w_1 + … + w_i < threshold · Σw }, strictly, with w = d² for the measure "energy" and w = d for "sum".
    singular_values: (k,), sorted downwards.

    Raises:
        ValueError: the threshold lies outside 0 to 1, the measure is unknown, or the spectrum is empty or not finite.
    """
    if singular_values.ndim != 1 or len(singular_values) == 0 or not torch.isfinite(singular_values).all():
        raise ValueError(f"A spectrum must be a list of finite singular values, but is {singular_values}.")
    return int(signal_counts(to_float64(singular_values)[None], (1, len(singular_values)), threshold, measure))


def signal_counts(values: Tensor, shape: tuple[int, int | Tensor], threshold: float | None, measure: Measure) -> Tensor:
    """signal_count for a batch of spectra (n, k) in float64, of matrices of that shape. Returns (n,), int64.

    Without a threshold, signal is what lies above the noise floor (see noise_floor.py), and the number of columns may
    be one for each matrix.
    """
    if measure not in get_args(Measure):
        raise ValueError(f"The measure must be one of {', '.join(get_args(Measure))}, but is '{measure}'.")
    if threshold is None:
        return count_above_noise(values, *shape).clamp_min(1)
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"The threshold is a share of the spectrum, from 0 to 1, but is {threshold}.")
    weights = values / torch.where(values[:, :1] > 0, values[:, :1], 1.0)
    sums = (weights.square() if measure == "energy" else weights).cumsum(-1)
    return (sums < threshold * sums[:, -1:]).sum(-1).clamp_min(1)


def dynamic_threshold(
    loss: float, epoch: float, total_epochs: float, minimum: float = 0.0, maximum: float = 1.0
) -> float:
    """p = 1 - loss ^ (1 + epoch / total_epochs), between minimum and maximum (AC-LoRA Eq. 5 and 6).

    `loss` is the mean since the last restart, relative to predicting the mean target, so 1 means nothing learned.

    Raises:
        ValueError: the loss is negative or not finite, or epoch, minimum or maximum lie outside their range.
    """
    if not (math.isfinite(loss) and loss >= 0.0):
        raise ValueError(f"The training loss must be finite and not negative, but is {loss}. Lower the learning rate.")
    if not (total_epochs > 0 and 0 <= epoch <= total_epochs):
        raise ValueError(f"The epoch must lie between 0 and all {total_epochs} epochs, but is {epoch}.")
    if not 0.0 <= minimum <= maximum <= 1.0:
        raise ValueError(f"The threshold range must be rising and within 0 to 1, but is {minimum} to {maximum}.")
    # A loss above 1 would only lie further below the minimum; its power could overflow.
    threshold = 1.0 - math.pow(min(loss, 1.0), 1.0 + epoch / total_epochs)
    return min(max(threshold, minimum), maximum)


def is_restart_epoch(epoch: int, interval: int, total_epochs: int) -> bool:
    """Whether to restart when `epoch` epochs are done: every `interval` epochs, while a full interval still follows.

    So fresh noise always has at least `interval` epochs to be trained or outweighed before the weights are saved.
    """
    if interval < 1:
        raise ValueError(f"The restart interval must be at least 1 epoch, but is {interval}.")
    return 0 < epoch <= total_epochs - interval and epoch % interval == 0
