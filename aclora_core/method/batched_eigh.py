"""Eigenvectors of many small symmetric matrices in one call.

Singular vectors of a wide matrix M (rank, in) come from its small Gram matrix M Mᵀ. In float64 the squaring costs
nothing that float32 weights could show: singular values are right to about 1e-8 of the largest.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

# How a GPU solves batches of matrices above this size. PyTorch before 2.12 hands these to cuSOLVER one by one, and
# only smaller ones all at once. "library": leave them to PyTorch; "sweeps": jacobi_eigen; "blocks": block_eigen.
_CUDA_BATCHED_SIZE = 32


_CUDA_ROUTINE: Literal["library", "sweeps", "blocks"] = "blocks"


# Above this size the solver's own loop is no slower than the sweeps below.
_LARGEST_SWEPT_SIZE = 192


_SMALLEST_SWEPT_BATCH = 16


_MOST_SWEEPS = 20


# A matrix counts as diagonal when no other entry is above this share of its largest.
_DIAGONAL = 1e-14


# Rows count as orthogonal when turning them would move no entry by more than this share of the largest eigenvalue.
_ORTHOGONAL = 2e-14


def to_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64, on the processor where its device (Apple's MPS) has no float64."""
    return tensor.detach().to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)


def gram(matrices: Tensor) -> Tensor:
    """M Mᵀ or Mᵀ M, whichever is smaller. matrices: (..., rows, cols), float64."""
    rows, cols = matrices.shape[-2:]
    return matrices @ matrices.mT if rows <= cols else matrices.mT @ matrices


def batched_eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
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
    if matrices.device.type == "cuda" and swept and _CUDA_ROUTINE != "library":
        values, vectors = (block_eigen if _CUDA_ROUTINE == "blocks" else jacobi_eigen)(scaled)
    else:
        rising, columns = torch.linalg.eigh(scaled)
        values, vectors = rising.flip(-1), columns.flip(-1)
    return values.clamp_min(0.0) * unit[:, None], vectors


def block_eigen(matrices: Tensor, width: int = _CUDA_BATCHED_SIZE // 2) -> tuple[Tensor, Tensor]:
    """symmetric_eigen by block Jacobi sweeps: the library solves pairs of blocks, small enough to be taken all at once.

    The matrix is cut into blocks of `width` rows and columns. A round diagonalises disjoint pairs of blocks, and a
    sweep meets every pair once (round-robin). Of a pair the block with the lower number gets the larger values: sorted
    so, four sweeps are enough as a rule. Sorted by the seats instead, some values would never meet.
    matrices: (n, size, size), float64, the largest diagonal entry 1 (or all 0).
    """
    count, size = matrices.shape[:2]
    blocks = -(-size // (2 * width)) * 2
    whole = blocks * width
    work = torch.nn.functional.pad(matrices, (0, whole - size, 0, whole - size))
    # No eigenvalue of a semidefinite matrix is -1, so what fills up stays by itself and comes last.
    work.diagonal(dim1=-2, dim2=-1)[:, size:] = -1.0
    rows = torch.eye(whole, dtype=work.dtype, device=work.device).expand(count, -1, -1).contiguous()
    moves, rising = _tournament(blocks)
    seats = torch.tensor([seat * width + place for seat in moves for place in range(width)], device=work.device)
    flips = [torch.tensor(flags, device=work.device)[:, None, None] for flags in rising]
    for _ in range(_MOST_SWEEPS):
        for flip in flips:
            work, rows = _block_round(work, rows, flip)
            work, rows = work[:, seats][:, :, seats], rows[:, seats]
        diagonal = work.diagonal(dim1=-2, dim2=-1)
        besides = (work - torch.diag_embed(diagonal)).abs().amax((-2, -1))
        if float((besides / diagonal.amax(-1).clamp_min(torch.finfo(work.dtype).tiny)).amax()) < _DIAGONAL:
            break
    values, order = work.diagonal(dim1=-2, dim2=-1).sort(dim=-1, descending=True)
    rows = rows.gather(1, order[..., None].expand_as(rows))
    return values[:, :size], rows[:, :size, :size].mT.contiguous()


def _block_round(work: Tensor, rows: Tensor, flip: Tensor) -> tuple[Tensor, Tensor]:
    """Diagonalises each pair of neighbouring blocks: Qᵀ · work · Q and Qᵀ · rows, Q with the pairs' vectors in blocks.

    work, rows: (n, size, size); flip: (pairs, 1, 1), whether a pair's values are to rise and not to fall.
    """
    count, size = work.shape[:2]
    pairs = flip.shape[0]
    shape = (count, pairs, size // pairs, size)
    tiles = work.view(count, pairs, size // pairs, pairs, size // pairs).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    vectors = torch.linalg.eigh(tiles.reshape(-1, *tiles.shape[2:])).eigenvectors.view(tiles.shape)
    turns = torch.where(flip, vectors, vectors.flip(-1)).mT
    turned = (turns @ work.view(shape)).view(work.shape)
    return (turns @ turned.mT.reshape(shape)).view(work.shape), (turns @ rows.view(shape)).view(rows.shape)


def _tournament(players: int) -> tuple[list[int], list[list[bool]]]:
    """A round-robin of an even number of players on seats, of which 0 and 1, 2 and 3, … meet.

    Returns for each seat which seat's player moves there after a round, and for each round of a sweep, and each pair,
    whether the first of the pair has the higher number. After a sweep all sit as at its start.
    """
    upper, lower = list(range(0, players, 2)), list(range(1, players, 2))
    moved = (upper[:1] + lower[:1] + upper[1:-1], lower[1:] + upper[-1:]) if players > 2 else (upper, lower)
    moves = [seat for pair in zip(*moved, strict=True) for seat in pair]
    sitting, rising = list(range(players)), []
    for _ in range(players - 1):
        rising.append([sitting[seat] > sitting[seat + 1] for seat in range(0, players, 2)])
        sitting = [sitting[seat] for seat in moves]
    return moves, rising


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
