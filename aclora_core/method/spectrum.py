"""The singular values of an adapter's delta, and the rules that read a rank from them.

delta = scale · lora_up · lora_down has at most `rank` singular values. They come from a small core (rank × rank):
lora_up = Q_up R_up, lora_downᵀ = Q_down R_down, and the core R_up R_downᵀ has the singular values of the product. The
delta itself is never built. All sums and decompositions run in float64, whatever the weights' type, so that no size of
weight or scale overflows; results come back in float32 or in the type of the weights.

Each rank rule takes singular values sorted downwards and returns how many to keep: at least 1, at most all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .batched_eigh import to_float64

_DAMAGED = "Train again with a lower learning rate, or use another file."


def delta_singular_values(lora_down: Tensor, lora_up: Tensor, scale: float | Tensor) -> Tensor:
    """Singular values of scale · lora_up · lora_down, sorted downwards, float32, on the factors' device.

    lora_down: (rank, in), or (rank, in, kh, kw) of a convolution; lora_up: (out, rank) or (out, rank, 1, 1).
    Many layers of one shape at once: (n, rank, in) and (n, out, rank), with one scale or n of them.
    Returns (min(rank, in, out),), with the leading n if there was one.

    Raises:
        ValueError: the shapes do not fit together, or a value is NaN or infinite.
    """
    down, up = _matrices(lora_down, lora_up)
    core = torch.linalg.qr(up, mode="r").R @ torch.linalg.qr(down.mT, mode="r").R.mT
    values: Tensor = torch.linalg.svdvals(core) * _factor(scale, core).abs()
    return values.to(lora_down.device, torch.float32)


def truncate(lora_down: Tensor, lora_up: Tensor, scale: float | Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors (lora_down, lora_up) of the best approximation of the delta by `rank` components (Eckart-Young).

    The scale is folded in, with √σ on each side: the new delta is lora_up · lora_down, so its alpha is its rank.
    Shapes as in delta_singular_values; a rank beyond min(rank, in, out) is cut to it. The result is contiguous, in the
    type and on the device of the input.

    Raises:
        ValueError: rank is below 1, the shapes do not fit together, or a value is NaN or infinite.
    """
    if rank < 1:
        raise ValueError(f"The rank to cut to must be at least 1, but is {rank}.")
    down, up = _matrices(lora_down, lora_up)
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.mT)
    u, s, vh = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    factor = _factor(scale, s)
    root = (s[..., :rank] * factor.abs()).sqrt()
    new_down = root[..., :, None] * (vh[..., :rank, :] @ q_down.mT)
    new_up = (q_up @ u[..., :rank]) * (root * factor.sign())[..., None, :]
    if lora_down.ndim >= 4:
        new_down = new_down.reshape(-1, *lora_down.shape[1:])
        new_up = new_up.reshape(*new_up.shape, *lora_up.shape[2:])
    return new_down.to(lora_down).contiguous(), new_up.to(lora_up).contiguous()


def _matrices(lora_down: Tensor, lora_up: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors as float64 matrices. Four dimensions and more are a convolution's, three a batch of matrices."""
    down = lora_down.flatten(1) if lora_down.ndim >= 4 else lora_down
    up = lora_up.flatten(1) if lora_up.ndim >= 4 else lora_up
    if down.ndim < 2 or up.ndim != down.ndim or down.shape[-2] != up.shape[-1] or down.shape[:-2] != up.shape[:-2]:
        raise ValueError(
            f"lora_down {tuple(lora_down.shape)} and lora_up {tuple(lora_up.shape)} do not fit together:"
            " they must be (rank, in) and (out, rank)."
        )
    for name, factor in (("lora_down", down), ("lora_up", up)):
        if not torch.isfinite(factor).all():
            raise ValueError(f"{name} holds NaN or infinity. {_DAMAGED}")
    return to_float64(down), to_float64(up)


def _factor(scale: float | Tensor, like: Tensor) -> Tensor:
    """The scale as a tensor that multiplies singular values (..., k): one number, or one for each layer of a batch."""
    factor = torch.as_tensor(scale, dtype=like.dtype, device=like.device)
    if not torch.isfinite(factor).all():
        raise ValueError(f"The scale (alpha / rank) must be a finite number, but is {scale}.")
    return factor[..., None]


def energy(singular_values: Tensor) -> float:
    """Σ d², the squared Frobenius norm of the matrix."""
    return float(checked_values(singular_values).square().sum())


def energy_kept(singular_values: Tensor, rank: int) -> float:
    """Share of Σ d² in the first `rank` components; 1 for a zero matrix, which loses nothing."""
    return _share_kept(relative(singular_values).square(), rank)


def sum_kept(singular_values: Tensor, rank: int) -> float:
    """Share of Σ d in the first `rank` components; 1 for a zero matrix."""
    return _share_kept(relative(singular_values), rank)


def effective_rank(singular_values: Tensor) -> float:
    """exp of the entropy of d / Σd (Roy and Vetterli 2007): n for n equal values, near 1 where one dominates.

    A zero matrix has the effective rank 1, as it keeps one component.
    """
    values = relative(singular_values)
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return float(torch.special.entr(shares).sum().exp())


def stable_rank(singular_values: Tensor) -> float:
    """Σ d² / d₁²: a rank that small components hardly move. 1 for a zero matrix."""
    return max(1.0, float(relative(singular_values).square().sum()))


def checked_values(singular_values: Tensor) -> Tensor:
    """The values in float64, refused where there is nothing to judge."""
    if singular_values.ndim != 1 or len(singular_values) == 0:
        shape = tuple(singular_values.shape)
        raise ValueError(f"A spectrum must be a list of singular values, but has the shape {shape}.")
    if not torch.isfinite(singular_values).all():
        raise ValueError(f"The spectrum holds NaN or infinity. {_DAMAGED}")
    return to_float64(singular_values)


def relative(singular_values: Tensor) -> Tensor:
    """d / d₁, so that squares neither overflow nor vanish."""
    values = checked_values(singular_values)
    return values / torch.where(values[0] > 0, values[0], 1.0)


def _share_kept(weights: Tensor, rank: int) -> float:
    total = float(weights.sum())
    return min(1.0, float(weights[:rank].sum()) / total) if total > 0.0 else 1.0
