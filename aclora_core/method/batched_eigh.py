"""Eigendecomposition of batches of small Gram matrices.

The singular values and left singular vectors of a wide matrix M (rank, width) come from its Gram matrix M Mᵀ
(rank, rank). In float64 the squaring loses nothing that float32 weights could show: singular values are right to about
1e-8 of the largest.
"""

from __future__ import annotations

import torch
from torch import Tensor

# PyTorch before 2.12 gives cuSOLVER larger matrices than this one at a time, and only smaller ones as a batch.
_CUDA_BATCHED_SIZE = 32

# On CUDA, block_jacobi_eigh takes over for sizes up to this one, above which cuSOLVER alone is as fast, …
_MAX_BLOCK_JACOBI_SIZE = 192

# … and for batches of at least this many matrices.
_MIN_BLOCK_JACOBI_BATCH = 16

_MAX_SWEEPS = 20

# Sweeps end when no off-diagonal entry exceeds this share of the largest diagonal entry.
_OFF_DIAGONAL_TOLERANCE = 1e-14


def to_float64(tensor: Tensor) -> Tensor:
    """Return the tensor detached and in float64, on its device, or on the CPU if that is MPS, which lacks float64."""
    return tensor.detach().to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)


def batched_eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors of positive semidefinite matrices G = V · diag(values) · Vᵀ.

    Args:
        matrices: (n, size, size), float64.

    Returns:
        Eigenvalues (n, size) in descending order, clamped to at least 0, and eigenvectors (n, size, size) in columns.
    """
    size = matrices.shape[-1]
    if matrices.shape[0] == 0 or size == 0:
        return matrices.new_zeros(matrices.shape[:2]), matrices.clone()
    largest = matrices.diagonal(dim1=-2, dim2=-1).amax(-1)
    unit = torch.where(largest > 0, largest, 1.0)
    scaled = matrices / unit[:, None, None]
    if _uses_block_jacobi(matrices):
        values, vectors = block_jacobi_eigh(scaled)
    else:
        ascending, columns = torch.linalg.eigh(scaled)
        values, vectors = ascending.flip(-1), columns.flip(-1)
    return values.clamp_min(0.0) * unit[:, None], vectors


def _uses_block_jacobi(matrices: Tensor) -> bool:
    """Return whether block_jacobi_eigh is faster for this batch than the library alone."""
    count, size = matrices.shape[:2]
    fits = _CUDA_BATCHED_SIZE < size <= _MAX_BLOCK_JACOBI_SIZE and count >= _MIN_BLOCK_JACOBI_BATCH
    return matrices.device.type == "cuda" and fits


def block_jacobi_eigh(matrices: Tensor, block_size: int = _CUDA_BATCHED_SIZE // 2) -> tuple[Tensor, Tensor]:
    """Compute batched_eigh by block Jacobi sweeps, whose subproblems are small enough for cuSOLVER's batched solver.

    Each matrix is divided into blocks of `block_size` rows and columns. A round diagonalises disjoint pairs of blocks;
    a sweep of rounds (a round-robin tournament) pairs every two blocks once. Within a pair, the block with the lower
    number receives the larger eigenvalues, so that four sweeps usually suffice. If the order followed the positions
    instead, some eigenvalues would never be compared.

    Args:
        matrices: (n, size, size), float64, with largest diagonal entry 1 (or all 0).

    Returns:
        Eigenvalues (n, size) in descending order and eigenvectors (n, size, size) in columns.
    """
    count, size = matrices.shape[:2]
    n_blocks = -(-size // (2 * block_size)) * 2
    padded_size = n_blocks * block_size
    padding = padded_size - size
    work = torch.nn.functional.pad(matrices, (0, padding, 0, padding))
    # A semidefinite matrix has no eigenvalue of -1, so the padding stays separate and is sorted last.
    work.diagonal(dim1=-2, dim2=-1)[:, size:] = -1.0
    rows = torch.eye(padded_size, dtype=work.dtype, device=work.device).expand(count, -1, -1).contiguous()
    moves, ascending_pairs = _round_robin(n_blocks)
    row_moves = [block * block_size + row for block in moves for row in range(block_size)]
    permutation = torch.tensor(row_moves, device=work.device)
    rounds = [torch.tensor(flags, device=work.device)[:, None, None] for flags in ascending_pairs]
    for _ in range(_MAX_SWEEPS):
        for is_ascending in rounds:
            work, rows = _jacobi_round(work, rows, is_ascending)
            work, rows = work[:, permutation][:, :, permutation], rows[:, permutation]
        if _is_diagonal(work):
            break
    values, order = work.diagonal(dim1=-2, dim2=-1).sort(dim=-1, descending=True)
    rows = rows.gather(1, order[..., None].expand_as(rows))
    return values[:, :size], rows[:, :size, :size].mT.contiguous()


def _is_diagonal(matrices: Tensor) -> bool:
    """Return whether all matrices are diagonal within _OFF_DIAGONAL_TOLERANCE."""
    diagonal = matrices.diagonal(dim1=-2, dim2=-1)
    off_diagonal = (matrices - torch.diag_embed(diagonal)).abs().amax((-2, -1))
    largest = diagonal.amax(-1).clamp_min(torch.finfo(matrices.dtype).tiny)
    return float((off_diagonal / largest).amax()) < _OFF_DIAGONAL_TOLERANCE


def _jacobi_round(work: Tensor, rows: Tensor, is_ascending: Tensor) -> tuple[Tensor, Tensor]:
    """Diagonalise each pair of neighbouring blocks: return Qᵀ · work · Q and Qᵀ · rows, Q block-diagonal.

    Args:
        work, rows: (n, size, size).
        is_ascending: (pairs, 1, 1), whether the eigenvalues of a pair are sorted upwards.
    """
    count, size = work.shape[:2]
    n_pairs = is_ascending.shape[0]
    pair_size = size // n_pairs
    shape = (count, n_pairs, pair_size, size)
    tiles = work.view(count, n_pairs, pair_size, n_pairs, pair_size).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    vectors = torch.linalg.eigh(tiles.reshape(-1, *tiles.shape[2:])).eigenvectors.view(tiles.shape)
    rotations = torch.where(is_ascending, vectors, vectors.flip(-1)).mT
    rotated = (rotations @ work.view(shape)).view(work.shape)
    new_work = (rotations @ rotated.mT.reshape(shape)).view(work.shape)
    new_rows = (rotations @ rows.view(shape)).view(rows.shape)
    return new_work, new_rows


def _round_robin(n_players: int) -> tuple[list[int], list[list[bool]]]:
    """Schedule a round-robin tournament of an even number of players, where seats 0 and 1, 2 and 3, … meet.

    After all rounds, every player is back on the first seat.

    Returns:
        For each seat, the seat whose player moves there after a round; and for each round and pair, whether the first
        player of the pair has the higher number.
    """
    moves = _seat_moves(n_players)
    seating = list(range(n_players))
    first_is_higher = []
    for _ in range(n_players - 1):
        first_is_higher.append([seating[seat] > seating[seat + 1] for seat in range(0, n_players, 2)])
        seating = [seating[seat] for seat in moves]
    return moves, first_is_higher


def _seat_moves(n_players: int) -> list[int]:
    """Return, for each seat, the seat whose player moves there: the first player stays, the others rotate."""
    upper, lower = list(range(0, n_players, 2)), list(range(1, n_players, 2))
    if n_players > 2:
        upper, lower = upper[:1] + lower[:1] + upper[1:-1], lower[1:] + upper[-1:]
    return [seat for pair in zip(upper, lower, strict=True) for seat in pair]
