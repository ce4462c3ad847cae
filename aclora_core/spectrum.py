"""The singular values of an adapter's delta, and the rules that read a rank from them.

delta = scale · lora_up · lora_down has at most `rank` singular values. They come from a small core (rank × rank):
lora_up = Q_up R_up, lora_downᵀ = Q_down R_down, and the core R_up R_downᵀ has the singular values of the product. The
delta itself is never built. All sums and decompositions run in float64, whatever the weights' type, so that no size of
weight or scale overflows; results come back in float32 or in the type of the weights.

Each rank rule takes singular values sorted downwards and returns how many to keep: at least 1, at most all.
"""

import torch
from torch import Tensor

from .eigen import as_double
from .noise_floor import noise_floor

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
    return as_double(down), as_double(up)


def _factor(scale: float | Tensor, like: Tensor) -> Tensor:
    """The scale as a tensor that multiplies singular values (..., k): one number, or one for each layer of a batch."""
    factor = torch.as_tensor(scale, dtype=like.dtype, device=like.device)
    if not torch.isfinite(factor).all():
        raise ValueError(f"The scale (alpha / rank) must be a finite number, but is {scale}.")
    return factor[..., None]


def energy(singular_values: Tensor) -> float:
    """Σ d², the squared Frobenius norm of the matrix."""
    return float(_values(singular_values).square().sum())


def energy_kept(singular_values: Tensor, rank: int) -> float:
    """Share of Σ d² in the first `rank` components; 1 for a zero matrix, which loses nothing."""
    return _share_kept(_relative(singular_values).square(), rank)


def sum_kept(singular_values: Tensor, rank: int) -> float:
    """Share of Σ d in the first `rank` components; 1 for a zero matrix."""
    return _share_kept(_relative(singular_values), rank)


def effective_rank(singular_values: Tensor) -> float:
    """exp of the entropy of d / Σd (Roy and Vetterli 2007): n for n equal values, near 1 where one dominates.

    A zero matrix has the effective rank 1, as it keeps one component.
    """
    values = _relative(singular_values)
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return float(torch.special.entr(shares).sum().exp())


def stable_rank(singular_values: Tensor) -> float:
    """Σ d² / d₁²: a rank that small components hardly move. 1 for a zero matrix."""
    return max(1.0, float(_relative(singular_values).square().sum()))


def rank_fixed(singular_values: Tensor, rank: float) -> int:
    """The given rank, 1 or more, or all that there is."""
    if not rank >= 1:
        raise ValueError(f"The rank to keep must be at least 1, but is {rank}.")
    return _within(int(min(rank, len(singular_values))), singular_values)


def rank_by_ratio(singular_values: Tensor, ratio: float) -> int:
    """Number of d_i > ratio · d₁, 0 <= ratio < 1. (Tools that ask for d_i > d₁ / p mean ratio = 1 / p.)"""
    if not 0.0 <= ratio < 1.0:
        raise ValueError(f"The ratio to the largest singular value must be from 0 to below 1, but is {ratio}.")
    return _within(int((_relative(singular_values) > ratio).sum()), singular_values)


def rank_by_sum(singular_values: Tensor, keep: float) -> int:
    """Smallest k with (d₁ + … + d_k) / Σd >= keep, 0 < keep <= 1."""
    return _smallest_reaching(_relative(singular_values), keep)


def rank_by_energy(singular_values: Tensor, keep: float) -> int:
    """Smallest k with (d₁² + … + d_k²) / Σd² >= keep, 0 < keep <= 1."""
    return _smallest_reaching(_relative(singular_values).square(), keep)


def rank_by_frobenius(singular_values: Tensor, keep: float) -> int:
    """Smallest k with √((d₁² + … + d_k²) / Σd²) >= keep: the share of the Frobenius norm, so energy at keep²."""
    _check_share(keep)
    return rank_by_energy(singular_values, keep * keep)


def rank_by_threshold(singular_values: Tensor, threshold: float) -> int:
    """Number of d_i > threshold, an absolute size, 0 or more."""
    if not threshold >= 0.0:
        raise ValueError(f"The smallest singular value to keep must be 0 or more, but is {threshold}.")
    return _within(int((_values(singular_values) > threshold).sum()), singular_values)


def rank_by_knee(singular_values: Tensor) -> int:
    """Components before the knee, where the spectrum lies deepest below the line from its first to its last value.

    Spectra fall steeply, then flatten, so they sag below that line (Kneedle, Satopää et al. 2011, for convex curves).
    The point itself is the first of the flat part and is not kept. A spectrum without a sag keeps everything.
    """
    values = _relative(singular_values)
    count = len(values)
    drop = float(values[0] - values[-1])
    if drop == 0.0 or count < 3:
        return count if float(values[0]) > 0.0 else 1
    height = (values - values[-1]) / drop
    sag = torch.linspace(1.0, 0.0, count, dtype=values.dtype, device=values.device) - height
    deepest = int(sag.argmax())
    # A straight line sags by rounding only.
    return _within(deepest, singular_values) if float(sag[deepest]) > 1e-6 else count


def rank_by_noise_floor(singular_values: Tensor, rows: int, cols: int, noise: float | None = None) -> int:
    """Number of singular values above noise_floor; for a delta of rank r, rows and cols are r."""
    return rank_by_threshold(singular_values, float(noise_floor(_values(singular_values), rows, cols, noise)))


def _values(singular_values: Tensor) -> Tensor:
    """The values in float64, refused where there is nothing to judge."""
    if singular_values.ndim != 1 or len(singular_values) == 0:
        shape = tuple(singular_values.shape)
        raise ValueError(f"A spectrum must be a list of singular values, but has the shape {shape}.")
    if not torch.isfinite(singular_values).all():
        raise ValueError(f"The spectrum holds NaN or infinity. {_DAMAGED}")
    return as_double(singular_values)


def _relative(singular_values: Tensor) -> Tensor:
    """d / d₁, so that squares neither overflow nor vanish."""
    values = _values(singular_values)
    return values / torch.where(values[0] > 0, values[0], 1.0)


def _share_kept(weights: Tensor, rank: int) -> float:
    total = float(weights.sum())
    return min(1.0, float(weights[:rank].sum()) / total) if total > 0.0 else 1.0


def _smallest_reaching(weights: Tensor, keep: float) -> int:
    _check_share(keep)
    reached = weights.cumsum(0)
    # The number of sums that fall short is one less than the count that does not: the + 1 stands here and nowhere else.
    return _within(int((reached < keep * reached[-1]).sum()) + 1, weights)


def _check_share(keep: float) -> None:
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"The share to keep must be above 0 and at most 1, but is {keep}.")


def _within(rank: int, singular_values: Tensor) -> int:
    return max(1, min(rank, len(singular_values)))
