"""Truncation of an adapter: each layer to its own rank, by a rule or for a file size, and what that loses.

An adapter is decomposed once, which is the costly part (one SVD per layer); after that every truncation is a slice, so
that many ranks or sizes can be tried. Layers of other kinds stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..method import Rule, energy, energy_kept, sum_kept, truncate
from .adapter import Adapter, Layer, is_finite
from .file_size import component_sizes, file_size

_SAVE_RESERVE = 64  # bytes; a truncated LoRA has "Dynamic" as its rank and its alpha


@dataclass(frozen=True, eq=False)
class SvdLayer:
    """SVD of one layer's delta, as factors sorted by singular value: the first k are its best rank-k approximation."""

    layer: Layer
    lora_down: Tensor  # (k, in, …), float32, rows √σ_i V_iᵀ
    lora_up: Tensor  # (out, k, …), float32, columns √σ_i U_i
    singular_values: Tensor  # (k,), float32, of the delta with its scale; k = min(rank, in, out)

    @property
    def params_per_component(self) -> int:
        """Parameters of one component: in + out."""
        return self.lora_down[0].numel() + self.lora_up.shape[0]


@dataclass(frozen=True)
class TruncationStats:
    """Ranks, energy and size of one layer before and after a truncation. Rank 0 means that the layer was dropped."""

    rank_before: int
    rank_after: int
    energy_before: float  # Σ σ² of the delta
    energy_kept: float  # share of Σ σ²
    sum_kept: float  # share of Σ σ
    bytes_before: int
    bytes_after: int


def decompose(adapter: Adapter) -> dict[str, SvdLayer]:
    """Compute the SVD of every layer's delta, without building it.

    Returns:
        Base name -> factors sorted by singular value.

    Raises:
        ValueError: a layer holds NaN or infinity; it is named.
    """
    decomposed = {}
    for name, layer in adapter.layers.items():
        down, up = layer.factors()
        try:
            down, up = truncate(down, up, layer.scale, layer.rank)
        except ValueError as error:
            raise ValueError(f"Layer '{name}': {error}") from error
        # Row i of lora_down has the norm √σ_i, and column i of lora_up as well.
        values = down.norm(dim=1) * up.norm(dim=0)
        lora_down = down.reshape(-1, *layer.lora_down.shape[1:])
        lora_up = up.reshape(*up.shape, *layer.lora_up.shape[2:])
        decomposed[name] = SvdLayer(layer, lora_down, lora_up, values)
    return decomposed


def ranks_by_rule(
    decomposed: Mapping[str, SvdLayer], rule: Rule, max_rank: int | None = None, min_rank: int = 1
) -> dict[str, int]:
    """Return the rank of each layer by a rule on its singular values, clamped to min_rank and max_rank.

    Raises:
        ValueError: min_rank is below 1 or above max_rank, or the rule refuses its parameter or a layer's spectrum.
    """
    if min_rank < 1 or (max_rank is not None and max_rank < min_rank):
        raise ValueError(f"The ranks must satisfy 1 <= smallest <= largest, but are {min_rank} and {max_rank}.")
    ranks = {}
    for name, layer in decomposed.items():
        rank = max(rule(layer.singular_values), min_rank)
        ranks[name] = min(rank, len(layer.singular_values), rank if max_rank is None else max_rank)
    return ranks


def ranks_for_size(
    adapter: Adapter,
    decomposed: Mapping[str, SvdLayer],
    size: int,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    min_rank: Literal[0, 1] = 1,
) -> dict[str, int]:
    """Return the ranks that keep the most energy in a file of at most `size` bytes.

    Greedy: components of all layers are taken by falling σ² per byte. As σ falls within each layer, no other choice of
    the same size keeps more energy, up to the last component that no longer fits.

    Args:
        decomposed: the layers of the adapter (decompose).
        size: bytes of the file, header and metadata included.
        dtype: in which the factors will be saved; None for the type they have.
        metadata: of the file; the adapter's if None.
        min_rank: 0 if a layer may be dropped.

    Raises:
        ValueError: not even min_rank of every layer fits; the smallest possible size is named.
    """
    ranks = dict.fromkeys(decomposed, int(min_rank))
    cost = component_sizes(adapter, dtype)
    left = size - _fixed_bytes(adapter, metadata, dtype) - sum(cost[name] * rank for name, rank in ranks.items())
    if left < 0:
        raise ValueError(
            f"A file of {size:,} bytes is too small: this LoRA takes at least {size - left:,} bytes"
            f" at rank {min_rank} in every layer. Choose a larger size, or a type with fewer bytes (fp16)."
        )
    offers = [
        (value * value / cost[name], -index, name)
        for name, layer in decomposed.items()
        for index, value in enumerate(layer.singular_values.tolist())
        if index >= min_rank and value > 0.0
    ]
    # Negative indices: among equal gains a layer's components are taken in their order.
    for _, negative_index, name in sorted(offers, reverse=True):
        if cost[name] <= left and ranks[name] == -negative_index:
            ranks[name] += 1
            left -= cost[name]
    return ranks


def truncate_to_ranks(
    adapter: Adapter,
    decomposed: Mapping[str, SvdLayer],
    ranks: Mapping[str, int],
    dtype: torch.dtype | None = None,
) -> tuple[Adapter, dict[str, TruncationStats]]:
    """Truncate each layer to its own rank.

    Args:
        decomposed: the layers of the adapter (decompose).
        ranks: base name -> rank; 0 drops the layer.
        dtype: of the new factors; None for the type they have.

    Returns:
        The new adapter, and for each layer what it lost. The scale is in the factors: alpha = rank, so scale = 1.

    Raises:
        ValueError: a value is too large for dtype; the layer is named.
    """
    layers: dict[str, Layer] = {}
    stats: dict[str, TruncationStats] = {}
    for name, source in decomposed.items():
        rank = min(ranks[name], len(source.singular_values))
        new_dtype = dtype or source.layer.lora_down.dtype
        if rank > 0:
            down, up = (
                t.to(new_dtype).clone(memory_format=torch.contiguous_format) for t in _leading_factors(source, rank)
            )
            if not (is_finite(down) and is_finite(up)):
                raise ValueError(
                    f"Layer '{name}' does not fit into {new_dtype}: choose a type with a larger range (fp32)."
                )
            layers[name] = Layer(down, up, float(rank))
        old, values = source.layer, source.singular_values
        stats[name] = TruncationStats(
            rank_before=old.rank,
            rank_after=rank,
            energy_before=energy(values),
            energy_kept=energy_kept(values, rank),
            sum_kept=sum_kept(values, rank),
            bytes_before=old.lora_down.nbytes + old.lora_up.nbytes,
            bytes_after=rank * _component_bytes(source, dtype),
        )
    return replace(adapter, layers=layers), stats


def total_energy_kept(stats: Mapping[str, TruncationStats]) -> float:
    """Return the share of all layers' Σ σ² that a truncation keeps, at most 1; 1 if there is no energy."""
    before = sum(layer.energy_before for layer in stats.values())
    kept = sum(layer.energy_before * layer.energy_kept for layer in stats.values())
    return min(1.0, kept / before) if before > 0.0 else 1.0  # rounded, the quotient may be a little more


def _leading_factors(source: SvdLayer, rank: int) -> tuple[Tensor, Tensor]:
    return source.lora_down[:rank], source.lora_up[:, :rank]


def _component_bytes(source: SvdLayer, dtype: torch.dtype | None) -> int:
    return source.params_per_component * (dtype or source.layer.lora_down.dtype).itemsize


def _fixed_bytes(adapter: Adapter, metadata: Mapping[str, str] | None, dtype: torch.dtype | None) -> int:
    """Return an upper bound of the file's bytes besides the factors: header, alphas, tensors of other kinds.

    The header is measured at full rank, where each number in it has at least as many digits.
    """
    cost = component_sizes(adapter, dtype)
    factors = sum(cost[name] * layer.rank for name, layer in adapter.layers.items())
    whole = file_size(adapter, adapter.metadata if metadata is None else metadata, dtype)
    return whole - factors + _SAVE_RESERVE
