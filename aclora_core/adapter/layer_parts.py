"""Layers with the same change of the weight in another shape: without a scale, in parts, and put together again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from .adapter import Layer


def without_scale(layer: Layer) -> Layer:
    """Return a layer with the scale 1, as files without alphas have it."""
    return _with_alpha(layer, float(layer.rank))


def with_one_alpha(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """Return layers that all have the smallest alpha of them: diffusers passes over some that differ."""
    alpha = min((layer.alpha for layer in layers.values() if layer.alpha > 0), default=1.0)
    return {name: _with_alpha(layer, alpha) for name, layer in layers.items()}


def _with_alpha(layer: Layer, alpha: float) -> Layer:
    factor = layer.alpha / alpha
    if factor == 1.0:
        return layer
    up, down = layer.lora_up.float(), layer.lora_down.float()
    if 0.0 < factor < 1.0:  # on both, so that neither gets too small for float16
        up, down = up * math.sqrt(factor), down * math.sqrt(factor)
    else:
        up = up * factor
    return Layer(down.to(layer.lora_down.dtype), up.to(layer.lora_up.dtype), alpha)


def swapped(layer: Layer) -> Layer:
    """Return a layer that gives a shift and a scale with the two changed, and any other layer as it is."""
    up = layer.lora_up
    if up.shape[0] != 2 * layer.lora_down.shape[1]:
        return layer
    return replace(layer, lora_up=torch.cat(up.chunk(2)[::-1]))


def split(layer: Layer, shares: Sequence[int]) -> list[Layer] | None:
    """Split a layer by its rows; each part gets a copy of lora_down.

    Args:
        shares: the rows of each part, as a multiple of the layer's columns.

    Returns:
        The parts, or None if the layer has another number of rows.
    """
    unit = layer.lora_down.shape[1]
    if layer.lora_up.shape[0] != unit * sum(shares):
        return None
    ups = layer.lora_up.split([unit * share for share in shares])
    # Files of tensors that share memory cannot be written.
    return [replace(layer, lora_down=layer.lora_down.clone(), lora_up=up.clone()) for up in ups]


def joined(parts: Mapping[int, Layer], shares: Sequence[int]) -> Layer | None:
    """Put the parts of a layer together: with their lora_down where they share it, else beside each other.

    Args:
        parts: by their index; some may be missing.
        shares: the rows of every part, as a multiple of the layer's columns.

    Returns:
        The layer, or None if the parts do not belong together.
    """
    first = next(iter(parts.values()))
    unit = first.lora_down.shape[1]
    fit = all(
        part.lora_down.ndim == part.lora_up.ndim == 2
        and part.lora_down.shape[1] == unit
        and part.lora_up.shape[0] == unit * shares[index]
        for index, part in parts.items()
    )
    if not fit:
        return None
    if len(parts) == len(shares) and all(_shares_down(part, first) for part in parts.values()):
        return replace(first, lora_up=torch.cat([parts[index].lora_up for index in range(len(shares))]))
    plain = {index: without_scale(part) for index, part in sorted(parts.items())}
    rank = sum(part.rank for part in plain.values())
    up = first.lora_up.new_zeros(unit * sum(shares), rank)
    column = 0
    for index, part in plain.items():
        row = unit * sum(shares[:index])
        up[row : row + part.lora_up.shape[0], column : column + part.rank] = part.lora_up
        column += part.rank
    return Layer(torch.cat([part.lora_down for part in plain.values()]), up, float(rank))


def _shares_down(part: Layer, other: Layer) -> bool:
    return part.scale == other.scale and torch.equal(part.lora_down, other.lora_down)
