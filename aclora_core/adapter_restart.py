"""The restart of a whole adapter at once, in the "paper" mode and in the two "product" modes.

"paper"           lora_down and lora_up are split and redrawn each by itself (AC-LoRA Eq. 2 and 3). The delta jumps.
"product"         The delta is split. Its signal stays; its noise directions are given up: in their place come fresh
                  rows of lora_down with zero columns of lora_up. The delta changes by the noise dropped, no more.
"product_redraw"  As "product", but fresh noise of the same energy takes the place of the old in the delta, in random
                  directions orthogonal to the signal.

The work is done on rank × rank matrices. The eigenvectors of all layers of one rank come from one call, whatever the
shapes of the layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .eigen import as_double, gram, symmetric_eigen
from .report import LayerRank
from .restart import Measure, first, redraw, redraw_product, signal_counts

Mode = Literal["paper", "product", "product_redraw"]

# Layers of one shape are stacked in float64 up to this many numbers (128 MiB), so that training memory stays free.
_CHUNK = 1 << 24

_Layers = Mapping[str, tuple[Tensor, Tensor, float]]


@dataclass(frozen=True)
class LayerRestart:
    """What a restart did to one layer."""

    rank: LayerRank  # components that were signal
    spectrum: list[float]  # singular values of the delta before the restart
    jump: float  # Frobenius norm of the delta's change, relative to the delta before
    redrawn_down: bool  # lora_down has new values, so its optimizer moments mean nothing any more
    redrawn_up: bool  # the same for lora_up


class _Spectra(NamedTuple):
    """The decompositions of a stack of layers. k = min(rank, in, out); a root R has Rᵀ R = M Mᵀ of its factor M."""

    down: tuple[Tensor, Tensor]  # eigenvalues and eigenvectors of lora_down's small Gram matrix
    up: tuple[Tensor, Tensor]
    root_up: Tensor
    delta: tuple[Tensor, Tensor]  # singular values (n, k) and left vectors (n, ., k) of the core root_up · root_downᵀ


def restart_adapter(
    layers: _Layers,
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
    with torch.no_grad():
        _check_finite(layers)
        chunks = _chunks(layers)
        results: dict[str, LayerRestart] = {}
        for names, spectra in zip(chunks, _decompose(layers, chunks), strict=True):
            results.update(_restart_chunk(layers, names, spectra, threshold, generator, mode, measure))
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


def _check_finite(layers: _Layers) -> None:
    downs, ups = [layer[0] for layer in layers.values()], [layer[1] for layer in layers.values()]
    for kind, factors in (("lora_down", downs), ("lora_up", ups)):
        # One question for all layers: on a GPU, each answer waits for all that is still under way.
        for name, good in zip(layers, _together([torch.isfinite(factor).all() for factor in factors]), strict=True):
            if not good:
                raise ValueError(
                    f"Layer '{name}': {kind} holds NaN or infinity, so training has diverged. Lower the learning rate."
                )


def _together(flags: Sequence[Tensor]) -> list[bool]:
    """The values of many one-element tensors, with one transfer for each device."""
    values: dict[int, bool] = {}
    for device in {flag.device for flag in flags}:
        places = [place for place, flag in enumerate(flags) if flag.device == device]
        values.update(zip(places, torch.stack([flags[place] for place in places]).tolist(), strict=True))
    return [values[place] for place in range(len(flags))]


def _chunks(layers: _Layers) -> list[list[str]]:
    """Names of layers that can be stacked: one shape, one device, and not too many."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, (down, up, _) in layers.items():
        groups.setdefault((down.flatten(1).shape, up.flatten(1).shape, down.device), []).append(name)
    chunks = []
    for names in groups.values():
        down, up, _ = layers[names[0]]
        step = max(1, _CHUNK // (down.numel() + up.numel()))
        chunks += [names[start : start + step] for start in range(0, len(names), step)]
    return chunks


def _stack(layers: _Layers, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """lora_down and lora_upᵀ of the layers: (n, rank, in) and (n, rank, out), float64."""
    down = torch.stack([as_double(layers[name][0].flatten(1)) for name in names])
    return down, torch.stack([as_double(layers[name][1].flatten(1).mT) for name in names])


def _decompose(layers: _Layers, chunks: Sequence[Sequence[str]]) -> list[_Spectra]:
    """The decompositions of every chunk. Stacks are made anew for each step: kept, they would fill the GPU's memory."""
    factors = _eigen_by_size([gram(factor) for names in chunks for factor in _stack(layers, names)])
    pairs = list(zip(factors[::2], factors[1::2], strict=True))
    roots = []
    for names, (eigen_down, eigen_up) in zip(chunks, pairs, strict=True):
        down, up = _stack(layers, names)
        roots.append((_root(down, *eigen_down), _root(up, *eigen_up)))
    cores = [up @ down.mT for down, up in roots]
    spectra = []
    for pair, (_, root_up), core, (values, vectors) in zip(
        pairs, roots, cores, _eigen_by_size([core @ core.mT for core in cores]), strict=True
    ):
        count = min(core.shape[1:])
        spectra.append(_Spectra(*pair, root_up, (values[:, :count].sqrt(), vectors[:, :, :count])))
    return spectra


def _root(factor: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
    """R with Rᵀ R = M Mᵀ, M the factor (n, rank, width); the shorter of rank and width is the number of its rows."""
    if factor.shape[1] > factor.shape[2]:
        return factor.mT
    return values.sqrt()[:, :, None] * vectors.mT


def _eigen_by_size(matrices: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """symmetric_eigen of each stack, with all stacks of one size in one call."""
    groups: dict[tuple[int, torch.device], list[int]] = {}
    for place, stack in enumerate(matrices):
        groups.setdefault((stack.shape[-1], stack.device), []).append(place)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for places in groups.values():
        values, vectors = symmetric_eigen(torch.cat([matrices[place] for place in places]))
        lengths = [len(matrices[place]) for place in places]
        parts = zip(torch.split(values, lengths), torch.split(vectors, lengths), strict=True)
        found.update(zip(places, parts, strict=True))
    return [found[place] for place in range(len(matrices))]


def _restart_chunk(
    layers: _Layers,
    names: Sequence[str],
    spectra: _Spectra,
    threshold: float | None,
    generator: torch.Generator,
    mode: Mode,
    measure: Measure,
) -> dict[str, LayerRestart]:
    down, up = _stack(layers, names)
    values = spectra.delta[0]
    count = values.shape[1]
    kept_down = signal_counts(spectra.down[0].sqrt(), down.shape[1:], threshold, measure)
    kept_up = signal_counts(spectra.up[0].sqrt(), up.shape[1:], threshold, measure)
    kept_delta = signal_counts(values, (count, count), threshold, measure)
    if mode == "paper":
        new_down, redrawn_down = redraw(down, spectra.down[1], kept_down, generator)
        new_up, redrawn_up = redraw(up, spectra.up[1], kept_up, generator)
    else:
        # σ_i V_iᵀ from the left vectors X_i of the core: X_iᵀ root_up · lora_down.
        rows = spectra.delta[1].mT @ spectra.root_up @ down
        new_down, new_up, redrawn_down = redraw_product(
            down, up, rows, values, kept_delta, generator, mode == "product_redraw"
        )
        redrawn_up = redrawn_down
    share = (values.square() * first(kept_delta, count)).sum(-1) / values.square().sum(-1)
    columns = [kept_down, kept_up, kept_delta, share.nan_to_num(1.0), _jump(down, up, new_down, new_up)]
    columns += [redrawn_down, redrawn_up]
    scales = [abs(layers[name][2]) for name in names]
    spectrum = (values * values.new_tensor(scales)[:, None]).tolist()
    results = {}
    for place, (name, row) in enumerate(zip(names, zip(*(column.tolist() for column in columns), strict=True))):
        lora_down, lora_up, _ = layers[name]
        *rank, jump, has_new_down, has_new_up = row
        if has_new_down:
            lora_down.copy_(new_down[place].reshape(lora_down.shape))
        if has_new_up:
            lora_up.copy_(new_up[place].mT.reshape(lora_up.shape))
        results[name] = LayerRestart(LayerRank(*rank), spectrum[place], jump, has_new_down, has_new_up)
    return results


def _jump(down: Tensor, up: Tensor, new_down: Tensor, new_up: Tensor) -> Tensor:
    """‖new delta - delta‖ / ‖delta‖ (Frobenius) for each layer, from rank × rank products; 0 for a zero delta."""

    def inner(a_down: Tensor, a_up: Tensor, b_down: Tensor, b_up: Tensor) -> Tensor:
        return ((a_down @ b_down.mT) * (a_up @ b_up.mT)).sum((-2, -1))

    before = inner(down, up, down, up)
    change = inner(new_down, new_up, new_down, new_up) + before - 2.0 * inner(new_down, new_up, down, up)
    return (change.clamp_min(0.0) / before).sqrt().nan_to_num(0.0, posinf=0.0)
