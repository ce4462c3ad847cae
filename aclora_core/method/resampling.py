"""The change that a restart makes to a batch of matrices: signal is kept, noise is redrawn.

Every matrix M is (rank, width): lora_down, or the transpose of lora_up. Its signal is U_S U_Sᵀ M, a product with a
rank × rank matrix, so all that a restart needs besides M itself follows from the Gram matrix M Mᵀ.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# A noise variance below this share of the mean square is rounding of float32: such a matrix is left unchanged.
NEGLIGIBLE_NOISE = torch.finfo(torch.float32).eps ** 2


class Resampling(NamedTuple):
    """A change M -> keep · M + level · noise of a batch of matrices M (n, rank, width), with standard normal noise.

    With a signal basis, the noise is first made orthogonal to the rows of signal_basis · M. With other_gram and energy,
    it is then scaled so that N = level · noise has Σ (N Nᵀ) ∘ other_gram = energy: the squared norm of the noise that
    it adds to the delta.
    """

    keep: Tensor  # (n, rank, rank)
    level: Tensor | None = None  # (n, rank), or (n, 1) for one level in all rows; None for no noise
    signal_basis: Tensor | None = None  # (n, n_signal, rank); signal_basis · M has orthonormal rows, or rows of zeros
    other_gram: Tensor | None = None  # (n, rank, rank), Gram matrix of the other factor's fresh rows
    energy: Tensor | None = None  # (n,)

    def at(self, indices: Tensor | slice) -> Resampling:
        """Return the change for some of the matrices."""
        return Resampling(*(None if part is None else part[indices] for part in self))  # type: ignore[arg-type]

    def apply(self, matrices: Tensor, noise: Tensor | None) -> Tensor:
        """Return the new matrices. `noise` is standard normal, of their shape, and may be overwritten."""
        new = self.keep @ matrices
        if noise is None or self.level is None:
            return new
        if self.signal_basis is not None:
            rows = self.signal_basis @ matrices
            noise = noise.baddbmm_(noise @ rows.mT, rows, alpha=-1.0)
        level = self.level
        if self.other_gram is not None and self.energy is not None:
            drawn_energy = ((noise @ noise.mT) * self.other_gram).sum((-2, -1))
            level = level * (self.energy / drawn_energy).nan_to_num(0.0, posinf=0.0).sqrt()[:, None]
        return new.addcmul_(noise, level[..., None])


def resample_noise(
    gram: Tensor, row_sums: Tensor, vectors: Tensor, n_signal: Tensor, n_elements: Tensor | int
) -> tuple[Resampling, Tensor]:
    """Keep the signal of each matrix and redraw its noise at the same variance (AC-LoRA Eq. 2).

    keep = U_S U_Sᵀ and level² = Var(M - keep · M). Where that variance is negligible, M stays: keep = 1 and level = 0.

    Args:
        gram: M Mᵀ, (n, rank, rank), float64.
        row_sums: Sums of the rows of M, (n, rank).
        vectors: U, the eigenvectors of gram in columns, (n, rank, rank).
        n_signal: Number of signal components of each matrix, (n,).
        n_elements: rank · width, one number or (n,).

    Returns:
        The change, and which matrices are redrawn: (n,), bool.
    """
    signal_vectors = vectors * prefix_mask(n_signal, vectors.shape[-1])[:, None, :]
    signal = signal_vectors @ signal_vectors.mT
    identity = _identity_like(gram)
    rest = identity - signal
    # M - M_signal = rest · M, and its squared norm is the trace of rest · M Mᵀ · restᵀ.
    mean = (rest @ row_sums[..., None]).sum((-2, -1)) / n_elements
    variance = ((rest @ gram) * rest).sum((-2, -1)) / n_elements - mean.square()
    mean_square = _squared_norms(gram) / n_elements
    is_redrawn = variance > NEGLIGIBLE_NOISE * mean_square
    keep = torch.where(is_redrawn[:, None, None], signal, identity)
    level = torch.where(is_redrawn, variance, 0.0).sqrt()[:, None]
    return Resampling(keep, level), is_redrawn


def resample_directions(
    gram: Tensor, root: Tensor, values: Tensor, vectors: Tensor, n_signal: Tensor, widths: Tensor
) -> tuple[Resampling, Resampling, Tensor]:
    """Keep the signal of each product lora_up · lora_down and redraw its other directions in lora_down.

    With the SVD lora_up · lora_down = Σ U_i σ_i V_iᵀ, row i of lora_down becomes c · V_iᵀ and column i of lora_up
    becomes U_i σ_i / c, with c the root mean square of the row norms of lora_down, so that lora_down keeps its size.
    The fresh rows of lora_down are normal, of expected norm about c, and orthogonal to the signal. Their columns of
    lora_up are 0 unless add_delta_noise is applied. A zero product, and one whose `rank` components are all signal,
    stay unchanged.

    Args:
        gram: D Dᵀ for D = lora_down, (n, rank, rank), float64.
        root: R with Rᵀ R = lora_upᵀ lora_up, (n, rank, rank).
        values: σ, the k singular values of the product, (n, k).
        vectors: X, the left singular vectors of R · lora_down in columns, (n, rank, k).
        n_signal: Number of signal components of each product, (n,).
        widths: Number of columns of lora_down, (n,).

    Returns:
        The change of lora_down, the change of lora_upᵀ, and which layers are redrawn: (n,), bool.
    """
    rank, count = gram.shape[-1], values.shape[1]
    # V_iᵀ = basis · D, since σ_i V_iᵀ = X_iᵀ R D. And U_i σ_i = lora_up · D V_i.
    inverse = torch.where(prefix_mask(n_signal, count) & (values > 0), 1.0 / values, 0.0)
    inverse = torch.nn.functional.pad(inverse, (0, rank - count))[:, :, None]
    basis = inverse * (torch.nn.functional.pad(vectors, (0, rank - count)).mT @ root)
    keep_up = basis @ gram
    max_signal = int(n_signal.max())  # rows of basis beyond are 0
    row_norm = (_squared_norms(gram) / rank).sqrt()[:, None, None]
    is_redrawn = (values[:, 0] > 0) & (n_signal < rank)
    redrawn_layers = is_redrawn[:, None, None]
    identity = _identity_like(gram)
    level = torch.where(_fresh_rows(is_redrawn, n_signal, rank), row_norm[..., 0] / widths.sqrt()[:, None], 0.0)
    down = Resampling(torch.where(redrawn_layers, row_norm * basis, identity), level, basis[:, :max_signal])
    up_basis = (inverse * keep_up)[:, :max_signal]
    up = Resampling(torch.where(redrawn_layers, keep_up / row_norm, identity), None, up_basis)
    return down, up, is_redrawn


def add_delta_noise(
    up: Resampling, down_gram: Tensor, values: Tensor, n_signal: Tensor, is_redrawn: Tensor
) -> Resampling:
    """Add noise to a change of lora_up from resample_directions, to restore the energy that each delta lost.

    The noise is orthogonal to the signal.

    Args:
        down_gram: D Dᵀ of the new lora_down, (n, rank, rank).
        values, n_signal, is_redrawn: As in resample_directions.
    """
    fresh = _fresh_rows(is_redrawn, n_signal, down_gram.shape[-1]).to(down_gram)
    lost_energy = (values.square() * ~prefix_mask(n_signal, values.shape[1])).sum(-1)
    fresh_gram = down_gram * fresh[:, :, None] * fresh[:, None, :]
    return up._replace(level=fresh, other_gram=fresh_gram, energy=lost_energy)


def prefix_mask(counts: Tensor, size: int) -> Tensor:
    """Return a mask (n, size) that is true in the first counts[i] positions of row i."""
    return torch.arange(size, device=counts.device) < counts[:, None]


def standard_normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw standard normal numbers in the shape, type and device of `like`.

    They are drawn in float32 on the generator's device, so that a seed gives the same numbers on every device.
    """
    return torch.randn(like.shape, generator=generator, device=generator.device, dtype=torch.float32).to(like)


def _fresh_rows(is_redrawn: Tensor, n_signal: Tensor, rank: int) -> Tensor:
    """Return a mask (n, rank) of the rows of lora_down that are redrawn."""
    return is_redrawn[:, None] & ~prefix_mask(n_signal, rank)


def _identity_like(matrices: Tensor) -> Tensor:
    """Return the identity matrix of the size, type and device of a batch of square matrices."""
    return torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)


def _squared_norms(gram: Tensor) -> Tensor:
    """Return ‖M‖² (Frobenius) of each matrix from M Mᵀ, (n,)."""
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1)
