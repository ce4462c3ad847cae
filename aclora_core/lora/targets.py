"""The layers of a model that a training adapts: by preset and patterns, in its network and in its text encoders."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

from torch import nn

from ..acceleration import is_linear, is_plain_convolution
from ..config import LayerPreset, TrainConfig, select_layers
from ..diffusion import DiffusionModel

log = logging.getLogger("aclora")


def target_layers(model: DiffusionModel, config: TrainConfig) -> dict[str, nn.Module]:
    """By their full names; those of text encoders only where they learn too.

    Raises:
        ValueError: the model has no linear layer, a pattern is in no name, no layer is left, or the text encoder is to
            learn and there is none.
    """
    layers = preset_layers(model.network, config.layers, model.prefix)
    if not layers:
        raise ValueError("This model has no linear layer that a LoRA could be trained on.")
    if config.text_learning:
        layers |= _text_layers(model, config)
    return {
        name: layers[name] for name in select_layers(layers, config.include_layers, config.exclude_layers, model.prefix)
    }


def alpha_scales(layers: Iterable[str], model: DiffusionModel, config: TrainConfig) -> dict[str, float]:
    """What the alpha of text layers is multiplied by: how fast they learn, as AdamW's steps have one length."""
    return {name: config.text_learning for name in layers if name.startswith(tuple(model.text_encoders))}


def _text_layers(model: DiffusionModel, config: TrainConfig) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for prefix, network in model.text_encoders.items():
        found |= preset_layers(network, config.layers, prefix)
    if not found:
        raise ValueError("The text encoder is to learn, but there is none. Connect AC-LoRA Text Encoder Options.")
    return found


_ATTENTION = re.compile(
    r"(^|[._])(attn\d*|attention\d*|self_attn|cross_attn|[a-z_]*_attn)([._]|$)|(^|\.)(to_[qkv]|qkv|[qkv])$"
    r"|(^|\.)single_blocks\.\d+\.linear[12]$"  # attention and feed-forward of Flux in one
)


# channelwise: Stable Cascade; block.layer1: the first Cosmos.
_FEED_FORWARD = re.compile(
    r"(^|[._])(ff|ff_context|ffn|mlp[CX]?|feed_forward|channelwise)([._]|$)|(^|\.)(linear|block\.layer)[12]$"
)


# Named after attention or an mlp, and neither: what scales and shifts, and what prepares words, timesteps and pictures.
_ASIDE = re.compile(r"modulation|(^|\.)(mlp_t5|\w*embedder\d*|\w*embedding|llm_adapter|visual)\.")


def preset_layers(model: nn.Module, preset: LayerPreset, prefix: str = "") -> dict[str, nn.Module]:
    """The layers that a preset means, by their full name with the prefix before it.

    "attention" and "attention and feed-forward" take the Linear layers so named; "all" takes every Linear and every
    plain convolution. A model without such names is taken whole.
    """
    linear = {name: module for name, module in model.named_modules() if is_linear(module)}
    if preset == "all":
        convolutions = {name: module for name, module in model.named_modules() if is_plain_convolution(module)}
        chosen = linear | convolutions
    else:
        patterns = [_ATTENTION] if preset == "attention" else [_ATTENTION, _FEED_FORWARD]
        inside = {name: module for name, module in linear.items() if not _ASIDE.search(name)}
        chosen = {name: m for name, m in inside.items() if any(pattern.search(name) for pattern in patterns)}
        if linear and not chosen:
            log.info("AC-LoRA: no layer of this model is named as '%s', so all its linear layers are trained.", preset)
            chosen = linear
    return {prefix + name: module for name, module in chosen.items()}
