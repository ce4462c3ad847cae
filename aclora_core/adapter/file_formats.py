"""An adapter in the formats of LoRA files: ComfyUI's, kohya's and diffusers' names of its layers, and back.

Where one layer of ComfyUI is several of diffusers' (queries, keys and values), its lora_up is split by rows, and each
part gets a copy of lora_down. The change of the weight stays the same, and each part has the layer's rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, get_args

from torch import Tensor

from .adapter import Adapter, Layer
from .key_formats import split_key
from .layer_parts import joined, split, swapped, with_one_alpha, without_scale
from .names import BASE_MODEL, COMFYUI_MODEL, COMFYUI_TEXT, Family, FileFormat, Match, base_model_of, family_of
from .peft_header import COMPONENTS

FormatChoice = Literal["automatic", FileFormat]
FILE_FORMAT = "aclora.format"  # in the metadata of files
FILE_NAMES = "aclora.names"  # ComfyUI's names of the layers, where those in kohya's format do not tell them

_HASHES = {"sshs_model_hash", "modelspec.hash_sha256"}  # in the metadata of files only
_OF_COMFYUI = (COMFYUI_MODEL, COMFYUI_TEXT)


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
        kept = {base: without_scale(each) if is_diffusers_name(base) else each for base, each in adapter.layers.items()}
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
    recorded = {match.fill(match.rule.kohya): name for name, match in _recorded_names(adapter.metadata, family)}
    matches = {
        base: family.by_comfyui(recorded[base]) if base in recorded else family.by_other(base)
        for base in _bases(adapter)
    }
    layers: dict[str, Layer] = {}
    parts: dict[str, dict[int, str]] = {}  # ComfyUI's name of a layer -> index of each part -> its name in the file
    names: dict[str, str] = {}
    for base, layer in adapter.layers.items():
        match = matches[base]
        name = match.fill(match.rule.comfyui) if match else base
        if match and is_diffusers_name(base) and len(match.rule.diffusers) > 1:
            parts.setdefault(name, {})[match.index] = base
        elif name in layers or name in adapter.layers and name != base:  # a second spelling of a layer
            layers[base] = layer
        else:
            names[base] = name
            layers[name] = swapped(layer) if match and match.rule.swapped and is_diffusers_name(base) else layer
    for name, bases in parts.items():
        found = {index: adapter.layers[base] for index, base in bases.items()}
        shares = next(match.rule.shares for base in bases.values() if (match := matches[base]))
        whole = joined(found, shares) if name not in layers else None
        layers |= {name: whole} if whole else {base: adapter.layers[base] for base in bases.values()}
    for base in adapter.other:
        match = matches[base]
        # A part of a layer that is no plain LoRA cannot be put together, and keeps its name.
        if match and not (is_diffusers_name(base) and (match.rule.swapped or len(match.rule.diffusers) > 1)):
            names[base] = match.fill(match.rule.comfyui)
    return _with_other_names(replace(adapter, layers=layers), names)


def is_diffusers_name(base: str) -> bool:
    """Return whether the name of a layer is one of diffusers', whose files have PEFT's keys and no alphas."""
    return base.partition(".")[0] in COMPONENTS


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
        layers = with_one_alpha(layers)
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
        raise NoNameError(f"Layer '{base}' is not a plain LoRA, and files for diffusers hold nothing else. {advice}")
    if match is None or not match.rule.diffusers:
        model = f"of {base_model}" if base_model else "(of an unknown model: connect the rank_report of its training)"
        raise NoNameError(f"Layer '{base}' {model} has no name in the format diffusers that ComfyUI can read. {advice}")
    layer = without_scale(layer)
    layer = swapped(layer) if match.rule.swapped else layer
    names = [match.fill(name) for name in match.rule.diffusers]
    parts = [layer] if len(names) == 1 else split(layer, match.rule.shares)
    if parts is None:
        raise NoNameError(
            f"Layer '{base}' has {layer.lora_up.shape[0]} rows, which are not the parts that diffusers knows. {advice}"
        )
    return dict(zip(names, parts, strict=True))


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


def _recorded_names(metadata: Mapping[str, str], family: Family) -> list[tuple[str, Match]]:
    try:
        names = json.loads(metadata.get(FILE_NAMES, "[]"))
    except (ValueError, RecursionError):
        return []
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    return [(name, match) for name in names if (match := family.by_comfyui(name))]
