"""Signal thresholds for batches of spectra, the checks of their arguments, and the epochs of restarts."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from .noise_floor import count_above_noise

Measure = Literal["energy", "sum"]  # share of Σ d² or of Σ d

# What is signal: a share p of the spectrum (AC-LoRA Eq. 3), from 0 to 1, or what lies above the noise floor.
SignalThreshold = float | Literal["noise floor"]


def signal_counts(
    singular_values: Tensor, rows: int, cols: int | Tensor, threshold: SignalThreshold, measure: Measure = "energy"
) -> Tensor:
    """Count the signal components of each spectrum of a batch, at least 1: signal_count, or count_above_noise.

    Args:
        singular_values: (n, k), float64, in descending order.
        rows, cols: Shape of the matrices, with one number of columns for all or (n,). Only the noise floor uses it.
        measure: Only a share uses it, as weights d² or d.

    Returns:
        (n,), int64.

    Raises:
        ValueError: The threshold or the measure is invalid.
    """
    check_measure(measure)
    if threshold == "noise floor":
        return count_above_noise(singular_values, rows, cols).clamp_min(1)
    check_share(threshold)
    largest = singular_values[:, :1]
    d = singular_values / torch.where(largest > 0, largest, 1.0)
    cumulative = (d.square() if measure == "energy" else d).cumsum(-1)
    return (cumulative < threshold * cumulative[:, -1:]).sum(-1).clamp_min(1)


def is_restart_epoch(epoch: int, interval: int, total_epochs: int) -> bool:
    """Return whether to restart after `epoch` epochs: every `interval` epochs, but not within the last interval.

    Fresh noise so gets at least `interval` epochs of training before the weights are saved. All three may as well be
    counted in optimizer steps.

    Raises:
        ValueError: The interval is below 1.
    """
    if interval < 1:
        raise ValueError(f"The restart interval must be at least 1, but is {interval}.")
    return 0 < epoch <= total_epochs - interval and epoch % interval == 0


def scheduled_threshold(done: float, total: float, first: float, last: float) -> float:
    """Return a threshold that rises linearly over a training, from `first` to `last`.

    Args:
        done: What the training has done, in epochs or steps.
        total: What it does in all, in the same unit.
        first, last: Shares of the spectrum that are signal, at its beginning and at its end.

    Raises:
        ValueError: An argument is out of range.
    """
    check_progress(done, total)
    check_range(first, last)
    return first + (last - first) * done / total


def check_measure(measure: Measure) -> None:
    """Raise ValueError unless the measure is known."""
    if measure not in get_args(Measure):
        raise ValueError(f"The measure must be one of {', '.join(get_args(Measure))}, but is '{measure}'.")


def check_share(threshold: float) -> None:
    """Raise ValueError unless the threshold is a share from 0 to 1."""
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"The threshold must be a share of the spectrum, from 0 to 1, but is {threshold}.")


def check_schedule(loss: float, epoch: float, total_epochs: float, minimum: float, maximum: float) -> None:
    """Raise ValueError unless all arguments of dynamic_threshold are in range."""
    if not (math.isfinite(loss) and loss >= 0.0):
        raise ValueError(f"The training loss must be finite and not negative, but is {loss}. Lower the learning rate.")
    check_progress(epoch, total_epochs)
    check_range(minimum, maximum)


def check_progress(done: float, total: float) -> None:
    """Raise ValueError unless the epoch, or the step, is one of the training."""
    if not (total > 0 and 0 <= done <= total):
        raise ValueError(f"The epoch or step must lie between 0 and the total of {total}, but is {done}.")


def check_range(minimum: float, maximum: float) -> None:
    """Raise ValueError unless the bounds of a threshold are shares in their order."""
    if not 0.0 <= minimum <= maximum <= 1.0:
        raise ValueError(f"The threshold range must lie within 0 to 1, minimum first, but is {minimum} to {maximum}.")


def check_finite(matrix: Tensor) -> None:
    """Raise ValueError if the matrix holds NaN or infinity."""
    if not torch.isfinite(matrix).all():
        raise ValueError("The matrix holds NaN or infinity, so training has diverged. Lower the learning rate.")
