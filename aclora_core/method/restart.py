"""The restart of a whole adapter at once, in the "paper" mode and in the two "product" modes.

"paper"           lora_down and lora_up are split and redrawn each by itself (AC-LoRA Eq. 2 and 3). The delta jumps.
"product"         The delta is split. Its signal stays; its noise directions are given up: in their place come fresh
                  rows of lora_down with zero columns of lora_up. The delta changes by the noise dropped, no more.
"product_redraw"  As "product", but fresh noise of the same energy takes the place of the old in the delta, in random
                  directions orthogonal to the signal.

The work is done on rank × rank matrices, for all layers of one rank at once, whatever their shapes (factor_stacks.py).
A factor as a whole is read twice, for M Mᵀ and for its change, and written once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .batched_eigh import batched_eigh
from .layer_groups import Group, Layers, Side, Stack, groups
from .resampling import Resampling, prefix_mask, redraw_product, resample_noise, standard_normal, with_noise
from .thresholds import Measure, signal_counts

Mode = Literal["paper", "product", "product_redraw"]


@dataclass(frozen=True)
class LayerRestart:
    """What a restart did to one layer."""

    rank: LayerRank  # components that were signal, and how far the delta jumped
    spectrum: list[float]  # singular values of the delta before the restart
    redrawn_down: bool  # lora_down has new values, so its optimizer moments mean nothing any more
    redrawn_up: bool  # the same for lora_up


class _Factor(NamedTuple):
    """One factor of all layers of a group: M is lora_down, or the transpose of lora_up."""

    square: Tensor  # M Mᵀ, (n, rank, rank)
    sums: Tensor  # of M's rows, (n, rank)
    values: Tensor  # singular values, (n, k)
    vectors: Tensor  # left singular vectors, (n, rank, rank)


class _Plan(NamedTuple):
    """What is to become of a group, and what is reported of it."""

    down: Resampling
    up: Resampling
    redrawn_down: Tensor
    redrawn_up: Tensor
    kept: tuple[Tensor, Tensor, Tensor]  # components of signal in lora_down, in lora_up and in the delta
    values: Tensor  # singular values of the delta over its scale


def restart_adapter(
    layers: Layers,
    threshold: float | None,
    generator: torch.Generator,
    mode: Mode = "paper",
    measure: Measure = "energy",
) -> dict[str, LayerRestart]:
    """Restarts every layer, in place: lora_down and lora_up get their new values under no_grad.

    layers: name -> (lora_down, lora_up, scale), lora_down (rank, in) or (rank, in, kh, kw), lora_up (out, rank) or
    (out, rank, 1, 1). Without a threshold, signal is what lies above the noise floor of each matrix.
    A layer whose delta is zero keeps its delta, and counts as one component of signal.
    The same seed gives the same adapter, as long as the layers come in the same order.

    Raises:
        ValueError: a layer holds NaN or infinity (it is named, and nothing is changed), or a setting is out of range.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"The restart mode must be one of {', '.join(get_args(Mode))}, but is '{mode}'.")
    results: dict[str, LayerRestart] = {}
    with torch.no_grad():
        parts = list(groups(layers))
        measured = [(_measure(group.down), _measure(group.up)) for group in parts]
        _check_finite(parts, measured)
        for group, (down, up) in zip(parts, measured, strict=True):
            plan = _plan(group, *_decompose(group, down, up), threshold, mode, measure)
            results.update(_results(group, plan, _rewrite(group, down[0], up[0], plan, generator, mode)))
    return {name: results[name] for name in layers}


def restart_product(
    lora_down: Tensor,
    lora_up: Tensor,
    threshold: float | None,
    generator: torch.Generator,
    measure: Measure = "energy",
    redraw_delta: bool = False,
) -> tuple[Tensor, Tensor, int]:
    """New (lora_down, lora_up) of one layer and the number of the delta's components kept; the inputs are unchanged.

    The mode "product", or "product_redraw" with redraw_delta. The scale of the delta has no part in it: signal is a
    matter of proportion. lora_down keeps its norm, so that training goes on at the same speed.
    """
    down, up = lora_down.detach().clone(), lora_up.detach().clone()
    mode: Mode = "product_redraw" if redraw_delta else "product"
    result = restart_adapter({"layer": (down, up, 1.0)}, threshold, generator, mode, measure)
    return down, up, result["layer"].rank.kept_delta


def _measure(side: Side) -> tuple[Tensor, Tensor]:
    """M Mᵀ (n, rank, rank) and the sums of M's rows (n, rank).

    M is made anew where it is needed again: if all were kept, they would fill the GPU's memory.
    """
    square, sums = side.gather(lambda matrices: (matrices @ matrices.mT, matrices.sum(-1)))
    return square, sums


def _check_finite(parts: Sequence[Group], measured: Sequence[tuple[tuple[Tensor, Tensor], ...]]) -> None:
    """Raises ValueError, with its name, for a layer that does not hold numbers alone."""
    # What is not finite in M is not finite in its squared norm. One question for all layers: on a GPU, each answer
    # waits for all that is still under way.
    norms = [square.diagonal(dim1=-2, dim2=-1).sum(-1) for both in measured for square, _ in both]
    good = torch.cat([torch.isfinite(each).to(norms[0].device) for each in norms]).tolist() if norms else []
    kinds = [(name, kind) for group in parts for kind in ("lora_down", "lora_up") for name in group.names]
    for (name, kind), is_good in zip(kinds, good, strict=True):
        if not is_good:
            raise ValueError(
                f"Layer '{name}': {kind} holds NaN or infinity, so training has diverged. Lower the learning rate."
            )


def _decompose(group: Group, *measured: tuple[Tensor, Tensor]) -> tuple[_Factor, _Factor]:
    """Both factors of the group, from their _measure."""
    values, vectors = batched_eigh(torch.cat([square for square, _ in measured]))
    halves = zip(measured, values.sqrt().chunk(2), vectors.chunk(2), strict=True)
    down, up = (_Factor(*both, roots, columns) for both, roots, columns in halves)
    return down, up


def _plan(group: Group, down: _Factor, up: _Factor, threshold: float | None, mode: Mode, measure: Measure) -> _Plan:
    """Which components are signal, and what is to become of the factors."""
    in_down, in_up, in_delta = group.counts
    # lora_upᵀ lora_up = Rᵀ R, and the delta's singular values are those of R · lora_down.
    root = up.values[:, :, None] * up.vectors.mT
    squares, vectors = batched_eigh(root @ down.square @ root.mT)
    values = squares[:, :in_delta].sqrt()
    rank = root.shape[1]
    kept_down = signal_counts(down.values[:, :in_down], (rank, group.down.widths), threshold, measure)
    kept_up = signal_counts(up.values[:, :in_up], (rank, group.up.widths), threshold, measure)
    kept_delta = signal_counts(values, (in_delta, in_delta), threshold, measure)
    kept = kept_down, kept_up, kept_delta
    if mode == "paper":
        of_down, new_down = resample_noise(down.square, down.sums, down.vectors, kept_down, rank * group.down.widths)
        of_up, new_up = resample_noise(up.square, up.sums, up.vectors, kept_up, rank * group.up.widths)
        return _Plan(of_down, of_up, new_down, new_up, kept, values)
    left = vectors[:, :, :in_delta]
    of_down, of_up, redrawn = redraw_product(down.square, root, values, left, kept_delta, group.down.widths)
    return _Plan(of_down, of_up, redrawn, redrawn, kept, values)


def _rewrite(group: Group, down: Tensor, up: Tensor, plan: _Plan, generator: torch.Generator, mode: Mode) -> Tensor:
    """Gives all factors their new values. down, up: M Mᵀ as it was. Returns the jump of each layer's delta, (n,)."""
    down_by_old, down_by_new = _apply(group.down, plan.down, generator)
    change = plan.up
    if mode == "product_redraw":
        change = with_noise(change, down_by_new, plan.values, plan.kept[2], plan.redrawn_down)
    up_by_old, up_by_new = _apply(group.up, change, generator)
    # Inner products of deltas are sums over rank × rank products.
    before = (down * up).sum((-2, -1))
    square = (down_by_new * up_by_new).sum((-2, -1)) + before - 2.0 * (down_by_old * up_by_old).sum((-2, -1))
    jump = (square.clamp_min(0.0) / before).sqrt().nan_to_num(0.0, posinf=0.0)
    return torch.where(plan.redrawn_down | plan.redrawn_up, jump, 0.0)


def _apply(side: Side, change: Resampling, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Gives the factors of one side their new values. Returns M_new Mᵀ and M_new M_newᵀ, (n, rank, rank)."""
    change = change.at(side.order)

    def rewritten(stack: Stack) -> tuple[Tensor, Tensor]:
        old = stack.matrices(side.is_up)
        noise = None if change.level is None else standard_normal(old, generator)
        new = change.at(stack.places).apply(old, noise)
        stack.write(new, side.is_up)
        return new @ old.mT, new @ new.mT

    by_old, by_new = side.gather_with(rewritten)
    return by_old, by_new


def _results(group: Group, plan: _Plan, jump: Tensor) -> dict[str, LayerRestart]:
    """What is reported, brought from the device all at once."""
    values = plan.values
    signal = values.square() * prefix_mask(plan.kept[2], values.shape[1])
    share = (signal.sum(-1) / values.square().sum(-1)).nan_to_num(1.0)
    columns = [*plan.kept, share, jump, plan.redrawn_down, plan.redrawn_up]
    table = torch.cat([torch.stack([column.double() for column in columns], 1), values * group.scales[:, None]], 1)
    results = {}
    for name, (down, up, delta, energy, leap, new_down, new_up, *spectrum) in zip(
        group.names, table.tolist(), strict=True
    ):
        rank = LayerRank(int(down), int(up), int(delta), energy, leap)
        results[name] = LayerRestart(rank, spectrum, bool(new_down), bool(new_up))
    return results


@dataclass(frozen=True)
class LayerRank:
    """How many components of one layer were signal at a restart."""

    kept_down: int  # in lora_down
    kept_up: int  # in lora_up
    kept_delta: int  # in the delta, their product
    energy: float  # share of the delta's energy Σ d² that was signal
    jump: float = math.nan  # ‖new delta - old delta‖ / ‖old delta‖ (Frobenius); NaN where it was not measured
