"""The AC-LoRA restart: what counts as signal, when to restart, and how one matrix is redrawn.

adapter_restart.py does this for all layers of an adapter at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .batched_eigh import batched_eigh, gram, to_float64
from .thresholds import Measure, signal_counts

# Noise below the rounding of float32 is no noise: a matrix of exact low rank is left as it is.
_ROUNDING = torch.finfo(torch.float32).eps


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
    double = to_float64(matrices)
    tall = double.shape[1] > double.shape[2]
    wide = double.mT if tall else double
    square = gram(wide)
    values, vectors = batched_eigh(square)
    kept = signal_counts(values.sqrt(), (wide.shape[1], wide.shape[2]), threshold, measure)
    change, _ = resample_noise(square, wide.sum(-1), vectors, kept, wide[0].numel())
    noise = standard_normal(double, generator)
    new = change.apply(wide, noise.mT if tall else noise)
    return (new.mT if tall else new).to(matrices).contiguous(), kept.tolist()


class Resampling(NamedTuple):
    """What a restart makes of matrices M (n, rank, width): keep · M + level · noise.

    The noise is made orthogonal to the rows of basis · M first. With a partner it is then scaled such that
    Σ (N Nᵀ) ∘ partner is the energy, N the noise times the level.
    """

    keep: Tensor  # (n, rank, rank)
    level: Tensor | None = None  # (n, rank), or (n, 1) for all rows alike; None for no noise
    basis: Tensor | None = None  # (n, most, rank)
    partner: Tensor | None = None  # (n, rank, rank)
    energy: Tensor | None = None  # (n,)

    def at(self, places: Tensor | slice) -> Resampling:
        """The part for some of the matrices."""
        return Resampling(*(None if part is None else part[places] for part in self))  # type: ignore[arg-type]

    def apply(self, matrices: Tensor, noise: Tensor | None) -> Tensor:
        """The new matrices. noise: standard normal, in the shape of the matrices; may be overwritten."""
        new = self.keep @ matrices
        if noise is None or self.level is None:
            return new
        if self.basis is not None:
            rows = self.basis @ matrices
            noise = noise.baddbmm_(noise @ rows.mT, rows, alpha=-1.0)
        level = self.level
        if self.partner is not None and self.energy is not None:
            drawn = ((noise @ noise.mT) * self.partner).sum((-2, -1))
            level = level * (self.energy / drawn).nan_to_num(0.0, posinf=0.0).sqrt()[:, None]
        return new.addcmul_(noise, level[..., None])


def resample_noise(
    square: Tensor, sums: Tensor, vectors: Tensor, kept: Tensor, numbers: Tensor | int
) -> tuple[Resampling, Tensor]:
    """Keeps the first `kept` components of each matrix M and draws the rest afresh (AC-LoRA Eq. 2).

    keep = U_S U_Sᵀ, and level² is the variance of the entries of M - keep · M. Where that is nothing but rounding, M
    stays as it is: keep = 1, level = 0.
    square: (n, rank, rank), M Mᵀ; vectors: its eigenvectors; sums: (n, rank), the sums of M's rows; kept: (n,);
    numbers: how many entries a matrix has, (n,) or one for all. Returns also which matrices are redrawn: (n,), bool.
    """
    basis = vectors * prefix_mask(kept, vectors.shape[-1])[:, None, :]
    signal, one = basis @ basis.mT, torch.eye(square.shape[-1], dtype=square.dtype, device=square.device)
    rest = one - signal
    # ‖rest · M‖² is the trace of rest · G · rest.
    mean = (rest @ sums[..., None]).sum((-2, -1)) / numbers
    variance = ((rest @ square) * rest).sum((-2, -1)) / numbers - mean.square()
    whole = square.diagonal(dim1=-2, dim2=-1).sum(-1) / numbers
    redrawn = variance > _ROUNDING**2 * whole
    keep = torch.where(redrawn[:, None, None], signal, one)
    return Resampling(keep, torch.where(redrawn, variance, 0.0).sqrt()[:, None]), redrawn


def redraw_product(
    square: Tensor, root: Tensor, values: Tensor, vectors: Tensor, kept: Tensor, widths: Tensor
) -> tuple[Resampling, Resampling, Tensor]:
    """Keeps the first `kept` components of up · down; the other directions are drawn afresh in lora_down.

    The signal comes as c · V_iᵀ in lora_down and U_i σ_i / c in lora_up, c the mean row norm of lora_down, so that
    lora_down keeps its size. The fresh rows of lora_down are normal, of norm c, orthogonal to the signal. Their columns
    of lora_up are 0, unless noise is added to them: with_noise.

    All float64. square: (n, rank, rank), D Dᵀ of lora_down; root: R with Rᵀ R = lora_upᵀ lora_up; values: (n, k), the
    singular values of the product; vectors: (n, rank, k), the left ones X of R · lora_down; kept: (n,); widths: (n,),
    columns of lora_down. Returns what becomes of lora_down and of lora_upᵀ, and for each layer whether it is redrawn.
    A zero product, or one that is signal in all `rank` components, stays as it is.
    """
    rank, count = square.shape[-1], values.shape[1]
    inverse = torch.where(prefix_mask(kept, count) & (values > 0), 1.0 / values, 0.0)
    inverse = torch.nn.functional.pad(inverse, (0, rank - count))[:, :, None]
    # V_iᵀ = basis · lora_down, since σ_i V_iᵀ = X_iᵀ R · lora_down; and U_i σ_i = lora_up · lora_down · V_i.
    basis = inverse * (torch.nn.functional.pad(vectors, (0, rank - count)).mT @ root)
    of_up = basis @ square
    most = int(kept.max())  # all rows beyond are 0
    norm = (square.diagonal(dim1=-2, dim2=-1).sum(-1) / rank).sqrt()[:, None, None]
    redrawn = (values[:, 0] > 0) & (kept < rank)
    chosen, one = redrawn[:, None, None], torch.eye(rank, dtype=square.dtype, device=square.device)
    fresh = redrawn[:, None] & ~prefix_mask(kept, rank)
    level = torch.where(fresh, norm[..., 0] / widths.sqrt()[:, None], 0.0)
    down = Resampling(torch.where(chosen, norm * basis, one), level, basis[:, :most])
    up = Resampling(torch.where(chosen, of_up / norm, one), None, (inverse * of_up)[:, :most])
    return down, up, redrawn


def with_noise(change: Resampling, down: Tensor, values: Tensor, kept: Tensor, redrawn: Tensor) -> Resampling:
    """The change of lora_up with noise orthogonal to the signal, such that the delta gets back the energy it lost.

    change: from redraw_product; down: (n, rank, rank), D Dᵀ of the new lora_down.
    """
    fresh = (redrawn[:, None] & ~prefix_mask(kept, down.shape[-1])).to(down)
    lost = (values.square() * ~prefix_mask(kept, values.shape[1])).sum(-1)
    return change._replace(level=fresh, partner=down * fresh[:, :, None] * fresh[:, None, :], energy=lost)


def prefix_mask(counts: Tensor, size: int) -> Tensor:
    """Mask (n, size) that is true for the first counts[i] places of row i."""
    return torch.arange(size, device=counts.device) < counts[:, None]


def standard_normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers in the shape of `like`, drawn where the generator lives: a seed gives the same on every device."""
    return torch.randn(like.shape, generator=generator, device=generator.device, dtype=torch.float32).to(like)
