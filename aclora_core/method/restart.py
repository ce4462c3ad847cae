"""The restart of all LoRA layers at once, in the "paper" mode and in two "product" modes.

"paper"           Split and redraw lora_down and lora_up each by itself (AC-LoRA Eq. 2 and 3), as ac_lora.py shows for
                  one layer. The delta jumps.
"product"         Split the delta. Its signal stays; its noise is dropped, and fresh rows of lora_down with zero columns
                  of lora_up take its place. The delta changes by the dropped noise alone.
"product_redraw"  As "product", but add fresh noise of the same energy to the delta, in random directions orthogonal to
                  the signal.

All decompositions are of rank × rank matrices, for all layers of one rank at once, whatever their shapes
(layer_groups.py). Each factor is read twice, for its Gram matrix M Mᵀ and for its change, and written once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .batched_eigh import batched_eigh
from .layer_groups import Group, Layers, Side, Stack, group_layers
from .resampling import (
    Resampling,
    add_delta_noise,
    prefix_mask,
    resample_directions,
    resample_noise,
    standard_normal,
)
from .thresholds import Measure, SignalThreshold, signal_counts

Mode = Literal["paper", "product", "product_redraw"]


@dataclass(frozen=True)
class LayerRank:
    """Number of signal components of one layer at a restart."""

    kept_down: int  # in lora_down
    kept_up: int  # in lora_up
    kept_delta: int  # in the delta, their product
    energy: float  # share of the delta's energy Σ d² that was signal
    jump: float = math.nan  # ‖new delta - old delta‖ / ‖old delta‖ (Frobenius); NaN if not measured


@dataclass(frozen=True)
class LayerRestart:
    """Result of a restart for one layer."""

    rank: LayerRank
    spectrum: list[float]  # singular values of the delta before the restart
    redrawn_down: bool  # lora_down has new values, so its optimizer moments no longer apply
    redrawn_up: bool  # lora_up has new values


class _Factor(NamedTuple):
    """One factor of all layers of a group: M is lora_down, or the transpose of lora_up."""

    gram: Tensor  # M Mᵀ, (n, rank, rank)
    row_sums: Tensor  # (n, rank)
    values: Tensor  # singular values, (n, rank)
    vectors: Tensor  # left singular vectors in columns, (n, rank, rank)


class _Plan(NamedTuple):
    """The changes of a group's factors, and the measurements to report."""

    down: Resampling
    up: Resampling
    redrawn_down: Tensor  # (n,), bool
    redrawn_up: Tensor  # (n,), bool
    n_signal: tuple[Tensor, Tensor, Tensor]  # signal components of lora_down, lora_up and the delta, each (n,)
    values: Tensor  # singular values of the delta over its scale, (n, k)


def restart_adapter(
    layers: Layers,
    threshold: SignalThreshold,
    generator: torch.Generator,
    mode: Mode = "paper",
    measure: Measure = "energy",
) -> dict[str, LayerRestart]:
    """Restart every layer in place, under no_grad. The same seed and order of layers give the same adapter.

    Args:
        layers: Name -> (lora_down, lora_up, scale), with lora_down (rank, in) or (rank, in, kh, kw) and lora_up
            (out, rank) or (out, rank, 1, 1).
        threshold: Share of each spectrum that is signal (AC-LoRA Eq. 3), or "noise floor".
        generator: Source of the noise, on any device.

    Returns:
        The result for each layer, in the order of the input. A layer with a zero delta keeps it, and counts as one
        signal component.

    Raises:
        ValueError: A layer holds NaN or infinity (the message names it, and no layer is changed), or the threshold,
            mode or measure is invalid.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"The restart mode must be one of {', '.join(get_args(Mode))}, but is '{mode}'.")
    results: dict[str, LayerRestart] = {}
    with torch.no_grad():
        groups = list(group_layers(layers))
        measured = [(_measure(group.down), _measure(group.up)) for group in groups]
        _check_finite(groups, measured)
        for group, (down, up) in zip(groups, measured, strict=True):
            plan = _plan(group, *_decompose(down, up), threshold, mode, measure)
            jump = _rewrite(group, down[0], up[0], plan, generator, mode)
            results.update(_results(group, plan, jump))
    return {name: results[name] for name in layers}


def _measure(side: Side) -> tuple[Tensor, Tensor]:
    """Return the Gram matrices M Mᵀ (n, rank, rank) and the row sums of M (n, rank).

    M itself is stacked anew when it is changed: all stacks at once would fill the GPU's memory.
    """
    gram, row_sums = side.map_matrices(lambda matrices: (matrices @ matrices.mT, matrices.sum(-1)))
    return gram, row_sums


def _check_finite(groups: Sequence[Group], measured: Sequence[tuple[tuple[Tensor, Tensor], ...]]) -> None:
    """Raise ValueError, naming the layer, if a factor holds NaN or infinity."""
    # Where M is not finite, neither is its squared norm. All layers are checked in one transfer, since each one would
    # synchronise with the GPU.
    norms = [gram.diagonal(dim1=-2, dim2=-1).sum(-1) for both in measured for gram, _ in both]
    is_finite = torch.cat([torch.isfinite(each).to(norms[0].device) for each in norms]).tolist() if norms else []
    factors = [(name, factor) for group in groups for factor in ("lora_down", "lora_up") for name in group.names]
    for (name, factor), is_good in zip(factors, is_finite, strict=True):
        if not is_good:
            raise ValueError(
                f"Layer '{name}': {factor} holds NaN or infinity, so training has diverged. Lower the learning rate."
            )


def _decompose(down: tuple[Tensor, Tensor], up: tuple[Tensor, Tensor]) -> tuple[_Factor, _Factor]:
    """Decompose both factors of a group, measured by _measure, in one batch."""
    squares, vectors = batched_eigh(torch.cat([down[0], up[0]]))
    down_values, up_values = squares.sqrt().chunk(2)
    down_vectors, up_vectors = vectors.chunk(2)
    return _Factor(*down, down_values, down_vectors), _Factor(*up, up_values, up_vectors)


def _plan(group: Group, down: _Factor, up: _Factor, threshold: SignalThreshold, mode: Mode, measure: Measure) -> _Plan:
    """Count the signal components and plan the changes of both factors."""
    down_size, up_size, delta_size = group.spectrum_sizes
    # lora_upᵀ lora_up = Rᵀ R, so the delta's singular values are those of R · lora_down, times the scale.
    root = up.values[:, :, None] * up.vectors.mT
    squares, vectors = batched_eigh(root @ down.gram @ root.mT)
    values = squares[:, :delta_size].sqrt()
    rank = root.shape[1]
    signal_down = signal_counts(down.values[:, :down_size], rank, group.down.widths, threshold, measure)
    signal_up = signal_counts(up.values[:, :up_size], rank, group.up.widths, threshold, measure)
    signal_delta = signal_counts(values, delta_size, delta_size, threshold, measure)
    n_signal = signal_down, signal_up, signal_delta
    if mode == "paper":
        new_down, redrawn_down = resample_noise(
            down.gram, down.row_sums, down.vectors, signal_down, rank * group.down.widths
        )
        new_up, redrawn_up = resample_noise(up.gram, up.row_sums, up.vectors, signal_up, rank * group.up.widths)
        return _Plan(new_down, new_up, redrawn_down, redrawn_up, n_signal, values)
    left = vectors[:, :, :delta_size]
    new_down, new_up, redrawn = resample_directions(down.gram, root, values, left, signal_delta, group.down.widths)
    return _Plan(new_down, new_up, redrawn, redrawn, n_signal, values)


def _rewrite(
    group: Group, down_gram: Tensor, up_gram: Tensor, plan: _Plan, generator: torch.Generator, mode: Mode
) -> Tensor:
    """Change all factors of a group.

    Args:
        down_gram, up_gram: M Mᵀ before the change, (n, rank, rank).

    Returns:
        The relative jump of each layer's delta, (n,).
    """
    down_cross, new_down_gram = _apply(group.down, plan.down, generator)
    up_change = plan.up
    if mode == "product_redraw":
        up_change = add_delta_noise(up_change, new_down_gram, plan.values, plan.n_signal[2], plan.redrawn_down)
    up_cross, new_up_gram = _apply(group.up, up_change, generator)
    # ⟨delta, delta'⟩ = Σ (D D'ᵀ) ∘ (U U'ᵀ) with D = lora_down and U = lora_upᵀ: no delta is built.
    old_energy = (down_gram * up_gram).sum((-2, -1))
    new_energy = (new_down_gram * new_up_gram).sum((-2, -1))
    squared_jump = new_energy + old_energy - 2.0 * (down_cross * up_cross).sum((-2, -1))
    jump = (squared_jump.clamp_min(0.0) / old_energy).sqrt().nan_to_num(0.0, posinf=0.0)
    return torch.where(plan.redrawn_down | plan.redrawn_up, jump, 0.0)


def _apply(side: Side, change: Resampling, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Change the factors of one side, stack by stack. Return M_new M_oldᵀ and M_new M_newᵀ, (n, rank, rank)."""
    change = change.at(side.order)

    def rewrite(stack: Stack) -> tuple[Tensor, Tensor]:
        old = stack.matrices(side.is_up)
        noise = None if change.level is None else standard_normal(old, generator)
        new = change.at(stack.positions).apply(old, noise)
        stack.write(new, side.is_up)
        return new @ old.mT, new @ new.mT

    cross, new_gram = side.map_stacks(rewrite)
    return cross, new_gram


def _results(group: Group, plan: _Plan, jump: Tensor) -> dict[str, LayerRestart]:
    """Collect what is reported of each layer, in one transfer from the device."""
    energies = plan.values.square()
    signal_energy = (energies * prefix_mask(plan.n_signal[2], energies.shape[1])).sum(-1)
    energy = (signal_energy / energies.sum(-1)).nan_to_num(1.0)
    columns = [*plan.n_signal, energy, jump, plan.redrawn_down, plan.redrawn_up]
    numbers = torch.stack([column.double() for column in columns], 1)
    table = torch.cat([numbers, plan.values * group.scales[:, None]], 1).tolist()
    results = {}
    for name, (kept_down, kept_up, kept_delta, share, leap, new_down, new_up, *spectrum) in zip(
        group.names, table, strict=True
    ):
        rank = LayerRank(int(kept_down), int(kept_up), int(kept_delta), share, leap)
        results[name] = LayerRestart(rank, spectrum, bool(new_down), bool(new_up))
    return results
