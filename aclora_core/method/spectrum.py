"""Singular values of a LoRA's delta, its truncation by SVD, and measures of its spectrum.

delta = scale · lora_up · lora_down has at most `rank` nonzero singular values. They are those of a small core: with the
QR decompositions lora_up = Q_up R_up and lora_downᵀ = Q_down R_down, the core is R_up R_downᵀ (rank × rank). The delta
itself is never built. Sums and decompositions run in float64 whatever the type of the weights, so that no weight or
scale overflows; results are float32 or in the type of the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .batched_eigh import to_float64

_HOW_TO_FIX_NON_FINITE = "Train again with a lower learning rate, or use another file."


def delta_singular_values(lora_down: Tensor, lora_up: Tensor, scale: float | Tensor) -> Tensor:
    """Return the singular values of scale · lora_up · lora_down in descending order, in float32.

    Args:
        lora_down: (rank, in), or (rank, in, kh, kw) of a convolution. A batch of n layers of one shape: (n, rank, in).
        lora_up: (out, rank) or (out, rank, 1, 1). A batch: (n, out, rank).
        scale: alpha / rank, one number or (n,) for a batch.

    Returns:
        (min(rank, in, out),), for a batch (n, min(rank, in, out)), on the factors' device.

    Raises:
        ValueError: The shapes do not match, or a value is NaN or infinite.
    """
    down, up = _factor_matrices(lora_down, lora_up)
    core = torch.linalg.qr(up, mode="r").R @ torch.linalg.qr(down.mT, mode="r").R.mT
    values: Tensor = torch.linalg.svdvals(core) * _scale_tensor(scale, core).abs()
    return values.to(lora_down.device, torch.float32)


def truncate(lora_down: Tensor, lora_up: Tensor, scale: float | Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors of the best approximation of a delta at the given rank (Eckart-Young).

    The scale is folded in, and both factors get √σ of each component: the new delta is lora_up · lora_down, so its
    alpha equals its rank.

    Args:
        lora_down, lora_up, scale: As in delta_singular_values.
        rank: At least 1. At most min(rank of the factors, in, out) is used.

    Returns:
        The new lora_down and lora_up, contiguous, in the type and on the device of the input.

    Raises:
        ValueError: The rank is below 1, the shapes do not match, or a value is NaN or infinite.
    """
    if rank < 1:
        raise ValueError(f"The rank to truncate to must be at least 1, but is {rank}.")
    down, up = _factor_matrices(lora_down, lora_up)
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.mT)
    u, s, vh = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    factor = _scale_tensor(scale, s)
    root = (s[..., :rank] * factor.abs()).sqrt()
    new_down = root[..., :, None] * (vh[..., :rank, :] @ q_down.mT)
    new_up = (q_up @ u[..., :rank]) * (root * factor.sign())[..., None, :]
    if lora_down.ndim >= 4:
        new_down = new_down.reshape(-1, *lora_down.shape[1:])
        new_up = new_up.reshape(*new_up.shape, *lora_up.shape[2:])
    return new_down.to(lora_down).contiguous(), new_up.to(lora_up).contiguous()


def _factor_matrices(lora_down: Tensor, lora_up: Tensor) -> tuple[Tensor, Tensor]:
    """Return both factors as float64 matrices. Three dimensions are a batch of matrices, four or more a convolution."""
    down = lora_down.flatten(1) if lora_down.ndim >= 4 else lora_down
    up = lora_up.flatten(1) if lora_up.ndim >= 4 else lora_up
    if down.ndim < 2 or up.ndim != down.ndim or down.shape[-2] != up.shape[-1] or down.shape[:-2] != up.shape[:-2]:
        raise ValueError(
            f"The shapes of lora_down {tuple(lora_down.shape)} and lora_up {tuple(lora_up.shape)} do not match:"
            " they must be (rank, in) and (out, rank)."
        )
    for name, factor in (("lora_down", down), ("lora_up", up)):
        if not torch.isfinite(factor).all():
            raise ValueError(f"{name} holds NaN or infinity. {_HOW_TO_FIX_NON_FINITE}")
    return to_float64(down), to_float64(up)


def _scale_tensor(scale: float | Tensor, like: Tensor) -> Tensor:
    """Return the scale as a tensor (..., 1) that multiplies singular values (..., k)."""
    factor = torch.as_tensor(scale, dtype=like.dtype, device=like.device)
    if not torch.isfinite(factor).all():
        raise ValueError(f"The scale (alpha / rank) must be a finite number, but is {scale}.")
    return factor[..., None]


def energy(singular_values: Tensor) -> float:
    """Return Σ d², the squared Frobenius norm of the matrix."""
    return float(checked_values(singular_values).square().sum())


def energy_kept(singular_values: Tensor, rank: int) -> float:
    """Return the share of Σ d² in the first `rank` components; 1 for a zero matrix, which loses nothing."""
    return _share_kept(relative(singular_values).square(), rank)


def sum_kept(singular_values: Tensor, rank: int) -> float:
    """Return the share of Σ d in the first `rank` components; 1 for a zero matrix."""
    return _share_kept(relative(singular_values), rank)


def effective_rank(singular_values: Tensor) -> float:
    """Return the exponential of the entropy of d / Σd (Roy and Vetterli 2007).

    It is n for n equal values, near 1 where one value dominates, and 1 for a zero matrix, which keeps one component.
    """
    values = relative(singular_values)
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return float(torch.special.entr(shares).sum().exp())


def stable_rank(singular_values: Tensor) -> float:
    """Return Σ d² / d₁², a rank that small components hardly change; 1 for a zero matrix."""
    return max(1.0, float(relative(singular_values).square().sum()))


def checked_values(singular_values: Tensor) -> Tensor:
    """Return singular values (k,) in float64.

    Raises:
        ValueError: The spectrum is empty, has more than one dimension, or holds NaN or infinity.
    """
    if singular_values.ndim != 1 or len(singular_values) == 0:
        shape = tuple(singular_values.shape)
        raise ValueError(f"A spectrum must be a list of singular values, one or more, but has the shape {shape}.")
    if not torch.isfinite(singular_values).all():
        raise ValueError(f"The spectrum holds NaN or infinity. {_HOW_TO_FIX_NON_FINITE}")
    return to_float64(singular_values)


def relative(singular_values: Tensor) -> Tensor:
    """Return d / d₁ in float64, so that squares neither overflow nor underflow. Raises as checked_values."""
    values = checked_values(singular_values)
    return values / torch.where(values[0] > 0, values[0], 1.0)


def _share_kept(weights: Tensor, rank: int) -> float:
    total = float(weights.sum())
    return min(1.0, float(weights[:rank].sum()) / total) if total > 0.0 else 1.0
