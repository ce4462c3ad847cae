"""Measure a LoRA, layer by layer and as a whole: sizes, spectra, ranks, and layers of other kinds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..adapter import (
    Adapter,
    Layer,
    RankReport,
    check_report,
    embedded_report,
    file_size,
    find_key_format,
    from_state_dict,
    layer_sort_key,
    left_out_lines,
    parse_layer_name,
    suffixes_by_base,
    to_comfyui_keys,
)
from ..method import delta_singular_values, effective_rank, energy, rank_by_energy, stable_rank

# Singular values below this, or below the rounding error of float32 beside the largest, count as dead.
DEAD_BELOW = 1e-6


_MAX_VALUE_LENGTH = 200  # characters of a metadata value


@dataclass(frozen=True)
class LayerFacts:
    """Measurements of one layer; σ are the singular values of its delta, with the scale."""

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
    dead: int  # components without effect
    signal: int | None  # signal rank found by the training; None without a report
    parameters: int
    size: int  # bytes
    spectrum: tuple[float, ...]

    @property
    def shown_rank(self) -> int:
        """Signal rank if the training measured it, else the components that hold 95 % of the energy."""
        return self.rank_95 if self.signal is None else self.signal


@dataclass(frozen=True)
class FileFacts:
    """Measurements of a whole LoRA."""

    name: str
    key_formats: dict[str, int]  # spelling of the keys -> layers
    prefixes: dict[str, int]  # "diffusion_model." -> layers
    parts: dict[str, int]  # "diffusion model", "te1", … -> layers
    kinds: dict[str, int]  # "linear", "conv 3x3" -> layers
    blocks: int
    ranks: dict[int, int]  # rank -> layers, rising
    dtypes: dict[str, int]
    parameters: int  # of all layers, those of other kinds included
    size: int  # bytes of the file, or of the one as which it would be saved
    norm: float  # √ of the sum of all layers' energies
    effective_rank: float  # mean over the layers, by their energy
    other: dict[str, str]  # layers of other kinds: base name or key -> kind
    metadata: dict[str, str]  # long values shortened
    left_out: list[str] = field(default_factory=list)  # a line for each reason why parts change nothing in ComfyUI
    remarks: list[str] = field(default_factory=list)  # sentences on how the file was read


@dataclass(frozen=True)
class Inspection:
    """Measurements of a LoRA, without its base model."""

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
    """Measure a LoRA in any key format.

    Args:
        name: for the user.
        size: bytes of its file; those of the file as which it would be saved if None.
        report: of its training; the one in the metadata if None, provided that it knows all the layers.
        on_layer: called after each layer with the number of layers done and of all layers.

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
        report = embedded_report(adapter)
    names = sorted(adapter.layers, key=layer_sort_key)
    layers = []
    for done, base in enumerate(names, 1):
        signal = report.signal.get(base) if report is not None else None
        layers.append(measure_layer(base, adapter.layers[base], signal))
        if on_layer is not None:
            on_layer(done, len(names))
    return Inspection(_measure_file(adapter, state_dict, layers, name, size), layers, report)


def measure_layer(name: str, layer: Layer, signal: int | None = None) -> LayerFacts:
    """Measure one layer, without building its delta.

    Raises:
        ValueError: a factor holds NaN or infinity; the layer is named.
    """
    try:
        values = delta_singular_values(*layer.factors(), layer.scale)
    except ValueError as error:
        raise ValueError(f"Layer '{name}': {error}") from error
    first, last = float(values[0]), float(values[-1])
    kernel_size = tuple(layer.lora_down.shape[2:])
    parsed = parse_layer_name(name)
    return LayerFacts(
        name=name,
        block=parsed.block,
        module=parsed.module,
        kind=f"conv {'x'.join(map(str, kernel_size))}" if kernel_size else "linear",
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
        # Components beyond min(in, out) are dead too.
        dead=int((values < max(DEAD_BELOW, torch.finfo(torch.float32).eps * first)).sum()) + layer.rank - len(values),
        # A truncated layer has fewer components than its training found.
        signal=None if signal is None else min(signal, layer.rank),
        parameters=layer.lora_down.numel() + layer.lora_up.numel(),
        size=layer.lora_down.nbytes + layer.lora_up.nbytes,
        spectrum=tuple(values.tolist()),
    )


def _measure_file(
    adapter: Adapter, state_dict: Mapping[str, Tensor], layers: list[LayerFacts], name: str, size: int | None
) -> FileFacts:
    names = [parse_layer_name(layer.name) for layer in layers]
    energies = [layer.norm**2 for layer in layers]
    weighted = math.fsum(e * layer.effective_rank for e, layer in zip(energies, layers, strict=True))
    total = math.fsum(energies)
    return FileFacts(
        name=name,
        key_formats=_key_formats(adapter, state_dict),
        prefixes=_counts(parsed.prefix or "none" for parsed in names),
        parts=_counts(parsed.text_encoder or "diffusion model" for parsed in names),
        kinds=_counts(layer.kind for layer in layers),
        blocks=len({parsed.block for parsed in names} - {""}),
        ranks=dict(sorted(Counter(layer.rank for layer in layers).items())),
        dtypes=_counts(layer.dtype for layer in layers),
        parameters=sum(layer.parameters for layer in layers) + sum(t.numel() for t in adapter.extra.values()),
        size=file_size(adapter) if size is None else size,
        norm=math.sqrt(total),
        effective_rank=weighted / total if total > 0.0 else 1.0,
        other=dict(sorted(adapter.other.items())),
        metadata={key: _shorten(value) for key, value in sorted(adapter.metadata.items())},
        left_out=left_out_lines(adapter.left_out),
        remarks=list(adapter.remarks),
    )


def _key_formats(adapter: Adapter, state_dict: Mapping[str, Tensor]) -> dict[str, int]:
    found, _ = suffixes_by_base(to_comfyui_keys(state_dict))
    # In a file of this package the layers may have other names, as FileFacts.metadata says.
    names = adapter.layers if adapter.layers.keys() <= found.keys() else found
    formats = [find_key_format(found[base]) for base in names]
    return _counts(form.name for form in formats if form is not None)


def _counts(values: Iterable[str]) -> dict[str, int]:
    """Count values, the most frequent first."""
    return dict(Counter(values).most_common())


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shorten(value: str) -> str:
    return value if len(value) <= _MAX_VALUE_LENGTH else f"{value[:40]}… ({len(value):,} characters)"
