"""The AC-LoRA restart: what counts as signal, when to restart, and how one matrix is redrawn.

adapter_restart.py does this for all layers of an adapter at once.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from .eigen import as_double, gram, symmetric_eigen
from .noise_floor import noise_floor

Measure = Literal["energy", "sum"]  # cumulative share of d² or of d

# Noise below the rounding of float32 is no noise: a matrix of exact low rank is left as it is.
_ROUNDING = torch.finfo(torch.float32).eps


def signal_count(singular_values: Tensor, threshold: float, measure: Measure = "energy") -> int:
    """Number of components that are signal (AC-LoRA Eq. 3), never under 1.

    #{ i : w_1 + … + w_i < threshold · Σw }, strictly, with w = d² for the measure "energy" and w = d for "sum".
    singular_values: (k,), sorted downwards.

    Raises:
        ValueError: the threshold lies outside 0 to 1, the measure is unknown, or the spectrum is empty or not finite.
    """
    if singular_values.ndim != 1 or len(singular_values) == 0 or not torch.isfinite(singular_values).all():
        raise ValueError(f"A spectrum must be a list of finite singular values, but is {singular_values}.")
    return int(signal_counts(as_double(singular_values)[None], (1, len(singular_values)), threshold, measure))


def signal_counts(values: Tensor, shape: Sequence[int], threshold: float | None, measure: Measure) -> Tensor:
    """signal_count for a batch of spectra (n, k) in float64, of matrices of that shape. Returns (n,), int64.

    Without a threshold, signal is what lies above the noise floor (see noise_floor.py).
    """
    if measure not in get_args(Measure):
        raise ValueError(f"The measure must be one of {', '.join(get_args(Measure))}, but is '{measure}'.")
    if threshold is None:
        return (values > noise_floor(values, *shape)[:, None]).sum(-1).clamp_min(1)
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


def restart_matrix(
    matrix: Tensor, threshold: float | None, generator: torch.Generator, measure: Measure = "energy"
) -> tuple[Tensor, int]:
    """The matrix with its noise components drawn afresh (AC-LoRA Eq. 2), and the number of components kept.

    M = U diag(d) Vᵀ, M_signal = U diag(d on the signal, 0 elsewhere) Vᵀ, and the result is M_signal + G, where the
    entries of G are normal with mean 0 and the variance of the entries of M - M_signal (over all of them, not n - 1).
    matrix: (rows, cols) or (rows, in, kh, kw). The result has its shape, type and device; the input is unchanged.
    Without a threshold, signal is what lies above the noise floor. A matrix without noise comes back as it is.

    Raises:
        ValueError: the matrix holds NaN or infinity, or the threshold lies outside 0 to 1.
    """
    new, kept = restart_matrices(matrix.flatten(1)[None], threshold, generator, measure)
    return new[0].reshape(matrix.shape), kept[0]


def restart_matrices(
    matrices: Tensor, threshold: float | None, generator: torch.Generator, measure: Measure = "energy"
) -> tuple[Tensor, list[int]]:
    """restart_matrix for each of matrices: (n, rows, cols), in one batch. The generator may live on another device."""
    broken = (~torch.isfinite(matrices)).flatten(1).any(1).nonzero()
    if len(broken):
        raise ValueError(f"Matrix {int(broken[0])} of {len(matrices)} holds NaN or infinity. Lower the learning rate.")
    double = as_double(matrices)
    values, vectors = symmetric_eigen(gram(double))
    kept = signal_counts(values.sqrt(), matrices.shape[1:], threshold, measure)
    new, _ = redraw(double, vectors, kept, generator)
    return new.to(matrices), kept.tolist()


def redraw(matrices: Tensor, vectors: Tensor, kept: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Keeps the first `kept` components of each matrix and draws the rest afresh (AC-LoRA Eq. 2).

    matrices: (n, rows, cols), float64; vectors: (n, k, k), the eigenvectors of their small Gram matrices, k the shorter
    side; kept: (n,). Returns new matrices, and for each whether it was redrawn: (n,), bool.
    """
    noise = standard_normal(matrices, generator)
    wide = matrices.shape[-2] <= matrices.shape[-1]
    basis = vectors * first(kept, vectors.shape[-1])[:, None, :]
    signal = basis @ (basis.mT @ matrices) if wide else (matrices @ basis) @ basis.mT
    variance = (matrices - signal).var((-2, -1), correction=0)
    redrawn = variance > _ROUNDING**2 * matrices.square().mean((-2, -1))
    new = signal + noise * variance.sqrt()[:, None, None]
    return torch.where(redrawn[:, None, None], new, matrices), redrawn


def redraw_product(
    down: Tensor, up: Tensor, rows: Tensor, values: Tensor, kept: Tensor, generator: torch.Generator, redraw_delta: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors whose product keeps the first `kept` components of up · down; the other directions are drawn afresh.

    The signal comes as c · V_iᵀ in lora_down and U_i σ_i / c in lora_up, c the mean row norm of lora_down, so that
    lora_down keeps its size. The fresh rows of lora_down are normal, of norm c, orthogonal to the signal. Their columns
    of lora_up are 0, or with redraw_delta normal and orthogonal to the signal, of the energy of the dropped noise.

    All float64. down: (n, rank, in); up: (n, rank, out), the transpose; values: (n, k) singular values of the product;
    rows: (n, k, in) with rows_i = σ_i V_iᵀ; kept: (n,). Returns both factors and for each layer whether it was redrawn.
    A zero product, or one that is signal in all `rank` components, comes back as it is.
    """
    rank, count = down.shape[1], values.shape[1]
    signal = first(kept, rank)[:, :, None]
    pad = (0, 0, 0, rank - count)
    inverse = torch.where(first(kept, count) & (values > 0), 1.0 / values, 0.0)[:, :, None]
    v = torch.nn.functional.pad(rows * inverse, pad)
    u_sigma = v @ down.mT @ up
    norm = (down.square().sum((-2, -1), keepdim=True) / rank).sqrt()
    fresh = standard_normal(down, generator) * (norm / math.sqrt(down.shape[-1]))
    fresh = torch.where(signal, 0.0, fresh - (fresh @ v.mT) @ v)
    new_down, new_up = norm * v + fresh, u_sigma / norm
    if redraw_delta:
        u = u_sigma * torch.nn.functional.pad(inverse, pad)
        noise = standard_normal(up, generator)
        noise = torch.where(signal, 0.0, noise - (noise @ u.mT) @ u)
        lost = (values.square() * ~first(kept, count)).sum(-1)
        drawn = ((noise @ noise.mT) * (fresh @ fresh.mT)).sum((-2, -1))
        new_up = new_up + noise * (lost / drawn).nan_to_num(0.0).sqrt()[:, None, None]
    redrawn = (values[:, 0] > 0) & (kept < rank)
    chosen = redrawn[:, None, None]
    return torch.where(chosen, new_down, down), torch.where(chosen, new_up, up), redrawn


def first(counts: Tensor, size: int) -> Tensor:
    """Mask (n, size) that is true for the first counts[i] places of row i."""
    return torch.arange(size, device=counts.device) < counts[:, None]


def standard_normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers in the shape of `like`, drawn where the generator lives: a seed gives the same on every device."""
    return torch.randn(like.shape, generator=generator, device=generator.device, dtype=torch.float32).to(like)
