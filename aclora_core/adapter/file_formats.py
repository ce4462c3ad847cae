"""An adapter in the formats of LoRA files: ComfyUI's, kohya's and diffusers' names of its layers, and back.

Where one layer of ComfyUI is several of diffusers' (queries, keys and values), its lora_up is split by rows, and each
part gets a copy of lora_down. The change of the weight stays the same, and each part has the layer's rank.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from .adapter import Adapter, Layer
from .header_alpha import PEFT_SETTINGS
from .key_formats import split_key
from .names import BASE_MODEL, COMFYUI_MODEL, COMFYUI_TEXT, Family, FileFormat, Match, base_model_of, family_of

FormatChoice = Literal["automatic", FileFormat]
FILE_FORMAT = "aclora.format"  # in the metadata of files
FILE_NAMES = "aclora.names"  # ComfyUI's names of the layers, where those in kohya's format do not tell them

_HASHES = {"sshs_model_hash", "modelspec.hash_sha256"}  # in the metadata of files only
_OF_COMFYUI = (COMFYUI_MODEL, COMFYUI_TEXT)
_COMPONENTS = ("transformer", "unet", "text_encoder", "text_encoder_2")  # of diffusers' pipelines


class NoNameError(ValueError):
    """A layer has no name in a format. The message names it and says what to do."""


def automatic_format(adapter: Adapter, base_model: str) -> FileFormat | None:
    """Return the format in which an adapter is written by default: that of its file, else that of its model's family.

    None for a file of another program whose names are not ComfyUI's, and stay.
    """
    recorded = adapter.metadata.get(FILE_FORMAT)
    for file_format in get_args(FileFormat):
        if file_format == recorded:
            return file_format
    if not all(base.startswith(_OF_COMFYUI) for base in _bases(adapter)):
        return None
    # A LoRA that was trained in this run has metadata too, but no hash.
    from_file = adapter.metadata and (BASE_MODEL not in adapter.metadata or not _HASHES.isdisjoint(adapter.metadata))
    return "ComfyUI" if from_file else family_of(base_model).automatic


def in_format(adapter: Adapter, choice: FormatChoice, base_model: str = "") -> tuple[Adapter, str]:
    """Return an adapter with the names of a format, which its metadata records, and a sentence for the user or "".

    Args:
        choice: "automatic" takes automatic_format, and ComfyUI's where a layer has no name in that.
        base_model: ComfyUI's class of the model, such as "SDXL"; "" takes what the adapter tells.

    Raises:
        NoNameError: a layer has no name in the format that was chosen.
    """
    base_model = base_model or _base_model(adapter)
    file_format = automatic_format(adapter, base_model) if choice == "automatic" else choice
    if file_format is None:
        kept = {
            base: _without_scale(each) if is_diffusers_name(base) else each for base, each in adapter.layers.items()
        }
        return replace(adapter, layers=kept), ""
    adapter = in_comfyui_names(adapter, base_model)
    try:
        return _renamed(adapter, file_format, base_model), ""
    except NoNameError as error:
        if choice != "automatic":
            raise
        return _renamed(adapter, "ComfyUI", base_model), f"Saved with ComfyUI's keys. {error}"


def in_comfyui_names(adapter: Adapter, base_model: str = "") -> Adapter:
    """Return an adapter with ComfyUI's names for all layers whose names are known, and parts put together again.

    Args:
        base_model: ComfyUI's class of the model; "" takes what the adapter tells.
    """
    family = family_of(base_model or _base_model(adapter))
    recorded = {_kohya(family, name): name for name in _recorded_names(adapter.metadata)}
    matches = {
        base: family.by_comfyui(recorded[base]) if base in recorded else family.by_other(base)
        for base in _bases(adapter)
    }
    layers: dict[str, Layer] = {}
    parts: dict[str, dict[int, Layer]] = {}  # ComfyUI's name -> index of the part -> part
    shares: dict[str, tuple[int, ...]] = {}
    names: dict[str, str] = {}
    for base, layer in adapter.layers.items():
        match = matches[base]
        name = match.fill(match.rule.comfyui) if match else base
        if match and is_diffusers_name(base) and len(match.rule.diffusers) > 1:
            parts.setdefault(name, {})[match.index] = layer
            shares[name] = match.rule.shares
        else:
            names[base] = name
            layers[name] = _swapped(layer) if match and match.rule.swapped and is_diffusers_name(base) else layer
    layers |= {name: _joined(found, shares[name]) for name, found in parts.items()}
    for base in adapter.other:
        match = matches[base]
        # A part of a layer that is no plain LoRA cannot be put together, and keeps its name.
        if match and not (is_diffusers_name(base) and (match.rule.swapped or len(match.rule.diffusers) > 1)):
            names[base] = match.fill(match.rule.comfyui)
    return _with_other_names(replace(adapter, layers=layers), names)


def is_diffusers_name(base: str) -> bool:
    """Return whether the name of a layer is one of diffusers', whose files have PEFT's keys and no alphas."""
    return base.partition(".")[0] in _COMPONENTS


def part_counts(adapter: Adapter) -> dict[str, int]:
    """Return the number of layers in the file, each with its own lora_down, as which each layer is saved by default."""
    written, _ = in_format(adapter, "automatic")
    if written.metadata.get(FILE_FORMAT) != "diffusers":
        return dict.fromkeys(adapter.layers, 1)
    family = family_of(_base_model(adapter))
    matches = {base: family.by_comfyui(base) for base in adapter.layers}
    return {base: len(match.rule.diffusers) if match else 1 for base, match in matches.items()}


def _renamed(adapter: Adapter, file_format: FileFormat, base_model: str) -> Adapter:
    """Return an adapter with ComfyUI's names in a format, which its metadata records."""
    family = family_of(base_model)
    layers: dict[str, Layer] = {}
    names: dict[str, str] = {}
    for base in _bases(adapter):
        if not base.startswith(_OF_COMFYUI):
            raise NoNameError(f"Layer '{base}' has no name in the format {file_format}. Choose the format automatic.")
        match, layer = family.by_comfyui(base), adapter.layers.get(base)
        try:
            if file_format == "diffusers":
                layers |= _in_diffusers(base, layer if base not in adapter.other else None, match, base_model)
            names[base] = _kohya(family, base) if file_format == "kohya" else base
        except NoNameError:
            if layer is None or base in adapter.other or layer.lora_up.is_meta or layer.lora_up.any():
                raise
            continue  # it changes nothing, as the last layer of a text encoder whose pooled output is not used
        if layer is not None and file_format != "diffusers":
            layers[names[base]] = layer
    if file_format == "kohya":
        layers = _with_one_alpha(layers)
    metadata = {**adapter.metadata, FILE_FORMAT: file_format}
    if base_model:
        metadata[BASE_MODEL] = base_model
    if file_format == "kohya" and any(family.by_other(name) is None for name in names.values()):
        metadata[FILE_NAMES] = json.dumps(sorted(names))
    else:
        metadata.pop(FILE_NAMES, None)
    return _with_other_names(replace(adapter, layers=layers, metadata=metadata), names)


def _kohya(family: Family, base: str) -> str:
    match = family.by_comfyui(base)
    if match is None:
        raise NoNameError(f"Layer '{base}' has no name in the format kohya. Choose the format ComfyUI.")
    return match.fill(match.rule.kohya)


def _in_diffusers(base: str, layer: Layer | None, match: Match | None, base_model: str) -> dict[str, Layer]:
    """Return the layers of a file for diffusers for one of ComfyUI's; None stands for a layer that is no plain LoRA."""
    advice = "Choose the format ComfyUI or kohya."
    if layer is None:
        raise NoNameError(f"Layer '{base}' is no plain LoRA, and files for diffusers hold only such. {advice}")
    if match is None or not match.rule.diffusers:
        model = f"of {base_model}" if base_model else "(of an unknown model: connect the rank_report of its training)"
        raise NoNameError(f"Layer '{base}' {model} has no name in the format diffusers that ComfyUI can read. {advice}")
    layer = _without_scale(layer)
    layer = _swapped(layer) if match.rule.swapped else layer
    names = [match.fill(name) for name in match.rule.diffusers]
    if len(names) == 1:
        return {names[0]: layer}
    unit = layer.lora_down.shape[1]  # each part is as wide as the layer's input, or a multiple of it
    if layer.lora_up.shape[0] != unit * sum(match.rule.shares):
        raise NoNameError(
            f"Layer '{base}' has {layer.lora_up.shape[0]} rows, which are not the parts that diffusers knows. {advice}"
        )
    rows = [unit * share for share in match.rule.shares]
    ups = layer.lora_up.split(rows)
    # Files of tensors that share memory cannot be written.
    return {
        name: replace(layer, lora_down=layer.lora_down.clone(), lora_up=up.clone())
        for name, up in zip(names, ups, strict=True)
    }


def _joined(parts: Mapping[int, Layer], shares: tuple[int, ...]) -> Layer:
    """Put the parts of a layer together: with their lora_down where they share it, else beside each other."""
    first_index, first = next(iter(parts.items()))
    unit = first.lora_up.shape[0] // shares[first_index]
    if len(parts) == len(shares) and all(
        torch.equal(part.lora_down, first.lora_down) and part.scale == first.scale for part in parts.values()
    ):
        return replace(first, lora_up=torch.cat([parts[index].lora_up for index in range(len(shares))]))
    scaled = {index: _without_scale(part) for index, part in sorted(parts.items())}
    rank = sum(part.rank for part in scaled.values())
    up = first.lora_up.new_zeros(unit * sum(shares), rank)
    column = 0
    for index, part in scaled.items():
        row = unit * sum(shares[:index])
        up[row : row + part.lora_up.shape[0], column : column + part.rank] = part.lora_up
        column += part.rank
    return Layer(torch.cat([part.lora_down for part in scaled.values()]), up, float(rank))


def _without_scale(layer: Layer) -> Layer:
    """Return the same change of the weight with the scale 1, as files without alphas have it."""
    return _with_alpha(layer, float(layer.rank))


def _with_one_alpha(layers: dict[str, Layer]) -> dict[str, Layer]:
    """Give all layers the commonest alpha: diffusers passes over those of attention layers that differ."""
    counts = Counter(layer.alpha for layer in layers.values() if layer.alpha)
    alpha = counts.most_common(1)[0][0] if counts else 1.0
    return {name: _with_alpha(layer, alpha) for name, layer in layers.items()}


def _with_alpha(layer: Layer, alpha: float) -> Layer:
    """Return the same change of the weight with another alpha."""
    if layer.alpha == alpha:
        return layer
    up = (layer.lora_up.float() * (layer.alpha / alpha)).to(layer.lora_up.dtype)
    return Layer(layer.lora_down, up, alpha)


def _swapped(layer: Layer) -> Layer:
    """Return a layer that gives a shift and a scale with the two changed, and any other layer as it is."""
    up = layer.lora_up
    if up.shape[0] != 2 * layer.lora_down.shape[1]:
        return layer
    return replace(layer, lora_up=torch.cat(up.chunk(2)[::-1]))


def _with_other_names(adapter: Adapter, names: Mapping[str, str]) -> Adapter:
    """Rename the layers of other kinds and their tensors."""

    def renamed(key: str) -> str:
        base, suffix = split_key(key)
        return names.get(base, base) + suffix

    other = {names.get(base, base): kind for base, kind in adapter.other.items()}
    extra: dict[str, Tensor] = {renamed(key): tensor for key, tensor in adapter.extra.items()}
    return replace(adapter, other=other, extra=extra)


def _bases(adapter: Adapter) -> list[str]:
    return list(dict.fromkeys((*adapter.layers, *adapter.other)))


def _base_model(adapter: Adapter) -> str:
    return base_model_of(adapter.metadata, _bases(adapter))


def _recorded_names(metadata: Mapping[str, str]) -> list[str]:
    try:
        names = json.loads(metadata.get(FILE_NAMES, "[]"))
    except (ValueError, RecursionError):
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def peft_settings(adapter: Adapter) -> dict[str, str]:
    """Return metadata that gives each layer the scale 1 in diffusers.

    Without it, diffusers 0.36 takes one alpha for all layers of a file without alphas, whatever their ranks.
    """
    settings: dict[str, object] = {}
    for component in _COMPONENTS:
        ranks = {
            _module(base, component): layer.rank
            for base, layer in adapter.layers.items()
            if base.startswith(f"{component}.")
        }
        if ranks:
            rank = next(iter(ranks.values()))
            # In older versions of transformers the layers of text encoders are inside "text_model".
            start = "" if component.startswith("text_encoder") else "^"
            patterns = {start + re.escape(name): each for name, each in ranks.items()}
            named = {"r": rank, "lora_alpha": rank, "rank_pattern": patterns, "alpha_pattern": patterns}
            settings |= {f"{component}.{key}": value for key, value in named.items()}
            settings[f"{component}.target_modules"] = list(ranks)
    return {PEFT_SETTINGS: json.dumps(settings)} if settings else {}


def _module(base: str, component: str) -> str:
    """Return the name of a layer in diffusers' own model."""
    name = base.removeprefix(f"{component}.").removeprefix("text_model.")
    return name.replace(".processor.to_out", ".to_out.0").replace(".processor.", ".")
