"""What a LoRA holds, layer by layer and as a whole: sizes, spectra, ranks, and what in it is no plain LoRA."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapter import (
    PAIRS,
    Adapter,
    Layer,
    RankReport,
    check_report,
    from_state_dict,
    group_by_base,
    host_names,
    natural_order,
    own_report,
    place_of,
)
from ..method import delta_singular_values, effective_rank, energy, rank_by_energy, stable_rank

FORMATS = ("kohya", "diffusers, old", "PEFT", "diffusers", "Mochi", "transformers", "PEFT with an adapter's name")


DEAD = 1e-6  # a direction below this size, or below the rounding of float32 beside the largest, does nothing


_LONGEST_VALUE = 200  # characters of a metadata value


@dataclass(frozen=True)
class LayerFacts:
    """One layer in numbers; σ are the singular values of its delta, with the scale."""

    name: str
    block: str
    module: str
    kind: str  # "linear", or "conv 3x3"
    shape: tuple[int, ...]  # of the weight that it changes: (out, in), or (out, in, kh, kw)
    dtype: str
    rank: int
    alpha: float
    scale: float  # alpha / rank
    norm: float  # Frobenius norm of the delta, √Σσ²
    sigma_first: float  # the largest
    sigma_last: float  # the smallest
    ratio: float  # of the two; infinite where the smallest is 0
    stable_rank: float  # Σσ² / σ₁²
    effective_rank: float  # exp of the entropy of σ / Σσ
    rank_90: int  # components for 90 % of the energy Σσ²
    rank_95: int
    rank_99: int
    dead: int  # directions that do nothing
    signal: int | None  # components that the training found to be signal; None without a report
    parameters: int
    size: int  # bytes
    spectrum: tuple[float, ...]

    @property
    def shown_rank(self) -> int:
        """The rank that counts: the signal where a training tells it, else what 95 % of the energy take."""
        return self.rank_95 if self.signal is None else self.signal


@dataclass(frozen=True)
class FileFacts:
    """A LoRA as a whole."""

    name: str
    key_formats: dict[str, int]  # spelling of the keys -> layers
    prefixes: dict[str, int]  # "diffusion_model." -> layers
    parts: dict[str, int]  # "diffusion model", "te1", … -> layers
    kinds: dict[str, int]  # "linear", "conv 3x3" -> layers
    blocks: int
    ranks: dict[int, int]  # rank -> layers, rising
    dtypes: dict[str, int]
    parameters: int  # of the layers and of what is no plain LoRA
    size: int  # bytes: of the file where there is one, else of its tensors
    norm: float  # √ of the sum of all layers' energies
    effective_rank: float  # mean over the layers, by their energy
    other: dict[str, str]  # base name or key -> what it is instead of a plain LoRA
    metadata: dict[str, str]  # long values shortened


@dataclass(frozen=True)
class Inspection:
    """All that can be said about a LoRA without its base model."""

    file: FileFacts
    layers: list[LayerFacts]  # in the model's order
    report: RankReport | None = None


def inspect_lora(
    state_dict: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    name: str = "LoRA",
    size: int | None = None,
    report: RankReport | None = None,
    on_layer: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Measures a LoRA in any key format.

    size: bytes of its file. report: of the training that made it; without one, the report in the metadata of the file,
    if it is of the same layers. on_layer is told the number of layers done and of all.

    Raises:
        ValueError: it is no LoRA, or damaged (the key is named), or the report is from another training.
    """
    try:
        adapter = from_state_dict(state_dict, metadata)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if report is not None:
        check_report(adapter, report)
    else:
        report = own_report(adapter)
    names = sorted(adapter.layers, key=natural_order)
    layers = []
    for done, base in enumerate(names, 1):
        signal = report.signal.get(base) if report is not None else None
        layers.append(measure_layer(base, adapter.layers[base], signal))
        if on_layer is not None:
            on_layer(done, len(names))
    return Inspection(_measure_file(adapter, state_dict, layers, name, size), layers, report)


def measure_layer(name: str, layer: Layer, signal: int | None = None) -> LayerFacts:
    """The facts of one layer. Its delta is not built: see delta_singular_values."""
    try:
        values = delta_singular_values(*layer.factors(), layer.scale)
    except ValueError as error:
        raise ValueError(f"Layer '{name}': {error}") from error
    first, last = float(values[0]), float(values[-1])
    window = tuple(layer.lora_down.shape[2:])
    place = place_of(name)
    return LayerFacts(
        name=name,
        block=place.block,
        module=place.module,
        kind=f"conv {'x'.join(map(str, window))}" if window else "linear",
        shape=(layer.lora_up.shape[0], *layer.lora_down.shape[1:]),
        dtype=_dtype_name(layer.lora_up),
        rank=layer.rank,
        alpha=layer.alpha,
        scale=layer.scale,
        norm=math.sqrt(energy(values)),
        sigma_first=first,
        sigma_last=last,
        ratio=first / last if last > 0.0 else math.inf,
        stable_rank=stable_rank(values),
        effective_rank=effective_rank(values),
        rank_90=rank_by_energy(values, 0.90),
        rank_95=rank_by_energy(values, 0.95),
        rank_99=rank_by_energy(values, 0.99),
        # A rank beyond the layer's sides leaves directions that no weight can give a size.
        dead=int((values < max(DEAD, torch.finfo(torch.float32).eps * first)).sum()) + layer.rank - len(values),
        # A layer that was cut has less than its training found.
        signal=None if signal is None else min(signal, layer.rank),
        parameters=layer.lora_down.numel() + layer.lora_up.numel(),
        size=layer.lora_down.nbytes + layer.lora_up.nbytes,
        spectrum=tuple(values.tolist()),
    )


def _measure_file(
    adapter: Adapter, state_dict: Mapping[str, Tensor], layers: list[LayerFacts], name: str, size: int | None
) -> FileFacts:
    places = [place_of(layer.name) for layer in layers]
    energies = [layer.norm**2 for layer in layers]
    weighted = math.fsum(e * layer.effective_rank for e, layer in zip(energies, layers, strict=True))
    total = math.fsum(energies)
    return FileFacts(
        name=name,
        key_formats=_key_formats(adapter, state_dict),
        prefixes=_counts(place.prefix or "none" for place in places),
        parts=_counts(place.part or "diffusion model" for place in places),
        kinds=_counts(layer.kind for layer in layers),
        blocks=len({place.block for place in places} - {""}),
        ranks=dict(sorted(Counter(layer.rank for layer in layers).items())),
        dtypes=_counts(layer.dtype for layer in layers),
        parameters=sum(layer.parameters for layer in layers) + sum(t.numel() for t in adapter.extra.values()),
        size=sum(tensor.nbytes for tensor in state_dict.values()) if size is None else size,
        norm=math.sqrt(total),
        effective_rank=weighted / total if total > 0.0 else 1.0,
        other=dict(sorted(adapter.other.items())),
        metadata={key: _shortened(value) for key, value in sorted(adapter.metadata.items())},
    )


def _key_formats(adapter: Adapter, state_dict: Mapping[str, Tensor]) -> dict[str, int]:
    found, _ = group_by_base(host_names(state_dict))
    pairs = dict(zip((up for up, _ in PAIRS), FORMATS, strict=True))
    return _counts(next(pairs[suffix] for suffix in pairs if suffix in found[base]) for base in adapter.layers)


def _counts(values: Iterable[str]) -> dict[str, int]:
    """Most frequent first."""
    return dict(Counter(values).most_common())


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shortened(value: str) -> str:
    return value if len(value) <= _LONGEST_VALUE else f"{value[:40]}… ({len(value):,} characters)"
