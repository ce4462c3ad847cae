"""The layers of a model that a training adapts: by preset and patterns, in its network and in its text encoders."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .config import TrainConfig
from .layer_patterns import select
from .lora import find_layers
from .model import Model


def chosen_layers(model: Model, config: TrainConfig) -> dict[str, nn.Module]:
    """By their full names; those of text encoders only where they learn too.

    Raises:
        ValueError: the model has no linear layer, a pattern is in no name, no layer is left, or the text encoder is to
            learn and there is none.
    """
    layers = find_layers(model.network, config.layers, model.prefix)
    if not layers:
        raise ValueError("This model has no linear layer that a LoRA could be trained on.")
    if config.text_learning:
        layers |= _text_layers(model, config)
    return {name: layers[name] for name in select(layers, config.include_layers, config.exclude_layers, model.prefix)}


def strengths(layers: Iterable[str], model: Model, config: TrainConfig) -> dict[str, float]:
    """What the alpha of text layers is multiplied by: how fast they learn, as AdamW's steps have one length."""
    return {name: config.text_learning for name in layers if name.startswith(tuple(model.text_encoders))}


def _text_layers(model: Model, config: TrainConfig) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for prefix, network in model.text_encoders.items():
        found |= find_layers(network, config.layers, prefix)
    if not found:
        raise ValueError("The text encoder is to learn, but there is none. Connect AC-LoRA Text Encoder Options.")
    return found
