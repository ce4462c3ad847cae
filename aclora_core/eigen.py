"""Eigenvectors of many small symmetric matrices in one call.

Singular vectors of a wide matrix M (rank, in) come from its small Gram matrix M Mᵀ. In float64 the squaring costs
nothing that float32 weights could show: singular values are right to about 1e-8 of the largest.
"""

import torch
from torch import Tensor

# cuSOLVER solves batches of matrices up to this size at once; PyTorch hands it larger ones one by one.
_CUDA_BATCHED_SIZE = 32
# Above this size the solver's own loop is no slower than the sweeps below.
_LARGEST_SWEPT_SIZE = 192
_SMALLEST_SWEPT_BATCH = 16
_MOST_SWEEPS = 20
# Rows count as orthogonal when turning them would move no entry by more than this share of the largest eigenvalue.
_ORTHOGONAL = 2e-14


def as_double(tensor: Tensor) -> Tensor:
    """The tensor in float64, on the processor where its device (Apple's MPS) has no float64."""
    return tensor.detach().to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)


def gram(matrices: Tensor) -> Tensor:
    """M Mᵀ or Mᵀ M, whichever is smaller. matrices: (..., rows, cols), float64."""
    rows, cols = matrices.shape[-2:]
    return matrices @ matrices.mT if rows <= cols else matrices.mT @ matrices


def symmetric_eigen(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of positive semidefinite matrices: G = V · diag(values) · Vᵀ, values falling.

    matrices: (n, size, size), float64. Returns values (n, size), never below 0, and vectors (n, size, size) in columns.
    Where a value is 0 within rounding, its vector has no meaning and may be 0.
    """
    size = matrices.shape[-1]
    if matrices.shape[0] == 0 or size == 0:
        return matrices.new_zeros(matrices.shape[:2]), matrices.clone()
    largest = matrices.diagonal(dim1=-2, dim2=-1).amax(-1)
    unit = torch.where(largest > 0, largest, 1.0)
    scaled = matrices / unit[:, None, None]
    swept = _CUDA_BATCHED_SIZE < size <= _LARGEST_SWEPT_SIZE and matrices.shape[0] >= _SMALLEST_SWEPT_BATCH
    if matrices.device.type == "cuda" and swept:
        values, vectors = jacobi_eigen(scaled)
    else:
        rising, columns = torch.linalg.eigh(scaled)
        values, vectors = rising.flip(-1), columns.flip(-1)
    return values.clamp_min(0.0) * unit[:, None], vectors


def jacobi_eigen(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """symmetric_eigen by one-sided Jacobi sweeps over the whole batch, for devices that solve one matrix at a time.

    The rows of G are rotated in pairs until all are orthogonal; they are then values · vectorsᵀ. One round turns
    size / 2 disjoint pairs of every matrix, and size - 1 rounds (a round-robin tournament) meet every pair once.
    matrices: (n, size, size), float64, the largest diagonal entry 1 (or all 0).
    """
    size = matrices.shape[-1]
    padded = max(4, size + size % 2)
    rows = torch.nn.functional.pad(matrices, (0, 0, 0, padded - size))
    for _ in range(_MOST_SWEEPS):
        rows, overlap = _sweep(rows)
        if float(overlap) < _ORTHOGONAL:
            break
    values, order = rows.norm(dim=-1).sort(dim=-1, descending=True)
    values, order = values[:, :size], order[:, :size]
    rows = rows.gather(1, order[..., None].expand(-1, -1, size))
    negligible = torch.finfo(rows.dtype).eps * values[:, :1]
    divisor = torch.where(values > negligible, values, torch.inf)
    return values, (rows / divisor[..., None]).mT.contiguous()


def _sweep(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Every pair of rows made orthogonal once, and the largest overlap met: the part of one row along a longer one."""
    half = rows.shape[1] // 2
    worst = rows.new_zeros(())
    for _ in range(rows.shape[1] - 1):
        upper, lower = rows[:, :half], rows[:, half:]
        dot = (upper * lower).sum(-1)
        upper_square, lower_square = (upper * upper).sum(-1), (lower * lower).sum(-1)
        turned = dot != 0
        longer = torch.maximum(upper_square, lower_square).sqrt()
        worst = torch.maximum(worst, torch.where(turned, dot.abs() / longer, 0.0).amax())
        slope = (lower_square - upper_square) / (2.0 * torch.where(turned, dot, 1.0))
        tangent = torch.copysign(1.0 / (slope.abs() + torch.hypot(slope, torch.ones_like(slope))), slope)
        tangent = torch.where(turned, tangent, 0.0)[..., None]
        cos = torch.rsqrt(1.0 + tangent * tangent)
        sin = cos * tangent
        top, bottom = cos * upper - sin * lower, sin * upper + cos * lower
        # The tournament: the first row stays, all others move on by one seat.
        rows = torch.cat((top[:, :1], bottom[:, :1], top[:, 1:-1], bottom[:, 1:], top[:, -1:]), dim=1)
    return rows, worst
