"""Cutting a whole adapter: each layer to its own rank, by a rule or to a file size, and what that loses.

An adapter is balanced once (the costly part: one decomposition for each layer); after that every cut is a slice, so
that many ranks or sizes can be tried. What is no plain LoRA passes through as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..method import Rule, energy, energy_kept, sum_kept, truncate
from .adapter import Adapter, Layer
from .lora_file import to_state_dict

# Saving adds a format, two hashes and the rounding of the header's length to 8 bytes.
_SAVE_RESERVE = 320


@dataclass(frozen=True, eq=False)
class SvdLayer:
    """A layer in its singular components, largest first: the first k of them are the best delta of rank k."""

    layer: Layer
    lora_down: Tensor  # (k, in, …), float32, rows √σ_i V_iᵀ
    lora_up: Tensor  # (out, k, …), float32, columns √σ_i U_i
    singular_values: Tensor  # (k,), float32, of the delta with its scale; k = min(rank, in, out)

    @property
    def component_numbers(self) -> int:
        """How many numbers one component takes in the file: in + out."""
        return self.lora_down[0].numel() + self.lora_up.shape[0]


@dataclass(frozen=True)
class TruncationStats:
    """What a cut did to one layer. Rank 0 means that the layer was dropped."""

    rank_before: int
    rank_after: int
    energy_before: float  # Σ σ² of the delta
    energy_kept: float  # share of Σ σ²
    sum_kept: float  # share of Σ σ
    bytes_before: int
    bytes_after: int


def decompose(adapter: Adapter) -> dict[str, SvdLayer]:
    """Every layer in its singular components.

    Raises:
        ValueError: a layer holds NaN or infinity; it is named.
    """
    balanced = {}
    for name, layer in adapter.layers.items():
        down, up = layer.factors()
        try:
            down, up = truncate(down, up, layer.scale, layer.rank)
        except ValueError as error:
            raise ValueError(f"Layer '{name}': {error}") from error
        # Row i of lora_down has the norm √σ_i, and column i of lora_up as well.
        values = down.norm(dim=1) * up.norm(dim=0)
        shapes = (-1, *layer.lora_down.shape[1:]), (*up.shape, *layer.lora_up.shape[2:])
        balanced[name] = SvdLayer(layer, down.reshape(shapes[0]), up.reshape(shapes[1]), values)
    return balanced


def ranks_by_rule(
    balanced: Mapping[str, SvdLayer], rule: Rule, max_rank: int | None = None, min_rank: int = 1
) -> dict[str, int]:
    """The rank of each layer by a rule on its singular values, held between min_rank and max_rank.

    Raises:
        ValueError: min_rank is below 1 or above max_rank, or the rule refuses its parameter or a layer's spectrum.
    """
    if min_rank < 1 or (max_rank is not None and max_rank < min_rank):
        raise ValueError(f"The ranks must satisfy 1 <= smallest <= largest, but are {min_rank} and {max_rank}.")
    ranks = {}
    for name, layer in balanced.items():
        rank = max(rule(layer.singular_values), min_rank)
        ranks[name] = min(rank, len(layer.singular_values), rank if max_rank is None else max_rank)
    return ranks


def ranks_for_size(
    adapter: Adapter,
    balanced: Mapping[str, SvdLayer],
    size: int,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    min_rank: Literal[0, 1] = 1,
) -> dict[str, int]:
    """Ranks with the most energy for a file of at most `size` bytes, header and metadata included.

    Components of all layers are taken by falling σ² per byte. As the gains fall within each layer, no other choice of
    the same size keeps more energy, up to the last component that no longer fits. With min_rank 0 a layer can be
    dropped. dtype: what the matrices will be saved in; None for the type they have.

    Raises:
        ValueError: not even min_rank of every layer fits; the least possible size is named.
    """
    ranks = dict.fromkeys(balanced, int(min_rank))
    cost = {name: _component_bytes(layer, dtype) for name, layer in balanced.items()}
    left = size - _overhead(adapter, metadata) - sum(cost[name] * rank for name, rank in ranks.items())
    if left < 0:
        raise ValueError(
            f"A file of {size:,} bytes is too small: this LoRA takes at least {size - left:,} bytes"
            f" at rank {min_rank} in every layer. Choose a larger size, or a type with fewer bytes (fp16)."
        )
    offers = [
        (value * value / cost[name], -place, name)
        for name, layer in balanced.items()
        for place, value in enumerate(layer.singular_values.tolist())
        if place >= min_rank and value > 0.0
    ]
    # Places count upwards among equals, so that a layer's components are always taken in their order.
    for _, place, name in sorted(offers, reverse=True):
        if cost[name] <= left and ranks[name] == -place:
            ranks[name] += 1
            left -= cost[name]
    return ranks


def truncate_to_ranks(
    adapter: Adapter,
    balanced: Mapping[str, SvdLayer],
    ranks: Mapping[str, int],
    dtype: torch.dtype | None = None,
) -> tuple[Adapter, dict[str, TruncationStats]]:
    """A new adapter with each layer at its own rank, and for each layer what was lost.

    The scale is in the factors, so alpha = rank and the new scale is 1. Rank 0 drops a layer.

    Raises:
        ValueError: a value is too large for dtype; the layer is named.
    """
    layers: dict[str, Layer] = {}
    cuts: dict[str, TruncationStats] = {}
    for name, source in balanced.items():
        rank = min(ranks[name], len(source.singular_values))
        kind = dtype or source.layer.lora_down.dtype
        if rank > 0:
            down, up = (t.to(kind).clone(memory_format=torch.contiguous_format) for t in _first(source, rank))
            if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
                raise ValueError(f"Layer '{name}' does not fit into {kind}: choose a type with a larger range (fp32).")
            layers[name] = Layer(down, up, float(rank))
        old, values = source.layer, source.singular_values
        cuts[name] = TruncationStats(
            rank_before=old.rank,
            rank_after=rank,
            energy_before=energy(values),
            energy_kept=energy_kept(values, rank),
            sum_kept=sum_kept(values, rank),
            bytes_before=old.lora_down.nbytes + old.lora_up.nbytes,
            bytes_after=rank * _component_bytes(source, dtype),
        )
    return replace(adapter, layers=layers), cuts


def total_energy_kept(cuts: Mapping[str, TruncationStats]) -> float:
    """Share of all layers' Σ σ² that a cut keeps, so that large layers count for more; 1 where there is none."""
    before = sum(cut.energy_before for cut in cuts.values())
    kept = sum(cut.energy_before * cut.energy_kept for cut in cuts.values())
    return kept / before if before > 0.0 else 1.0


def _first(source: SvdLayer, rank: int) -> tuple[Tensor, Tensor]:
    return source.lora_down[:rank], source.lora_up[:, :rank]


def _component_bytes(source: SvdLayer, dtype: torch.dtype | None) -> int:
    return source.component_numbers * (dtype or source.layer.lora_down.dtype).itemsize


def _overhead(adapter: Adapter, metadata: Mapping[str, str] | None) -> int:
    """Bytes of the file that no rank changes, or more: length, header, alphas and the tensors of other kinds.

    The header is measured as it would be at full rank, where each number in it has at least as many digits.
    """
    tensors = to_state_dict(adapter)
    total = sum(tensor.numel() * max(tensor.itemsize, 4) for tensor in tensors.values())
    # Eight characters for the type are more than any name in the format takes.
    table: dict[str, object] = {
        key: {"dtype": "F" * 8, "shape": list(tensor.shape), "data_offsets": [total, total]}
        for key, tensor in tensors.items()
    }
    table["__metadata__"] = dict(adapter.metadata if metadata is None else metadata)
    header = len(json.dumps(table, separators=(",", ":")).encode())
    fixed = sum(tensor.nbytes for tensor in adapter.extra.values()) + 4 * len(adapter.layers)
    return 8 + header + fixed + _SAVE_RESERVE
