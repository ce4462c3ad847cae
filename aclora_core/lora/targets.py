"""Target layers of a training: by preset and name patterns, in the network and in its text encoders."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

from torch import nn

from ..acceleration import is_linear, is_plain_convolution
from ..config import LayerPreset, select_layers
from ..diffusion import DiffusionModel

log = logging.getLogger("aclora")

_ATTENTION = re.compile(
    r"(^|[._])(attn\d*|attention\d*|self_attn|cross_attn|[a-z_]*_attn)([._]|$)|(^|\.)(to_[qkv]|qkv|[qkv])$"
    r"|(^|\.)single_blocks\.\d+\.linear[12]$"  # attention and feed-forward of Flux in one
)

# channelwise: Stable Cascade; block.layer1: the first Cosmos.
_FEED_FORWARD = re.compile(
    r"(^|[._])(ff|ff_context|ffn|mlp[CX]?|feed_forward|channelwise)([._]|$)|(^|\.)(linear|block\.layer)[12]$"
)

# Match the patterns but are neither attention nor feed-forward: adaLN modulation; text, timestep and patch embedders.
_EXCLUDED = re.compile(r"modulation|(^|\.)(mlp_t5|\w*embedder\d*|\w*embedding|llm_adapter|visual)\.")


def target_layers(
    model: DiffusionModel, preset: LayerPreset, include: str, exclude: str, train_text_encoders: bool
) -> dict[str, nn.Module]:
    """Return the layers to train by their full name.

    Args:
        model: whose network, and text encoders, are searched.
        preset: kinds of layers.
        include: name patterns, one a line; layers that match none are left out. Empty for all layers.
        exclude: name patterns, one a line, of layers to leave out.
        train_text_encoders: whether text encoders are trained too.

    Raises:
        ValueError: the model has no linear layer, a pattern matches no name, no layer is left, or text encoders are to
            be trained and there is none.
    """
    layers = preset_layers(model.network, preset, model.prefix)
    if not layers:
        raise ValueError("This model has no linear layer, so there is nothing that a LoRA could be trained on.")
    if train_text_encoders:
        layers |= _text_encoder_layers(model, preset)
    names = select_layers(layers, include, exclude, model.prefix)
    return {name: layers[name] for name in names}


def alpha_scales(layers: Iterable[str], text_encoder_prefixes: Iterable[str], scale: float) -> dict[str, float]:
    """Return the alpha factor of those layers that are in a text encoder.

    AdamW's steps have one length, so a layer with half the alpha learns half as fast.

    Args:
        layers: full names of the target layers.
        text_encoder_prefixes: with which the names of text encoder layers begin.
        scale: factor of their alpha.
    """
    prefixes = tuple(text_encoder_prefixes)
    return {name: scale for name in layers if name.startswith(prefixes)}


def _text_encoder_layers(model: DiffusionModel, preset: LayerPreset) -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {}
    for prefix, network in model.text_encoders.items():
        layers |= preset_layers(network, preset, prefix)
    if not layers:
        raise ValueError(
            "The text encoder is to be trained, but there is none. Connect AC-LoRA Text Encoder Options, or set "
            "text_learning to 0."
        )
    return layers


def preset_layers(model: nn.Module, preset: LayerPreset, prefix: str = "") -> dict[str, nn.Module]:
    """Return the layers of a preset by their full name, which is the prefix and the name in the model.

    "attention" and "attention and feed-forward" select linear layers by name; "all" selects every linear layer and
    every plain convolution. If no layer has such a name, all linear layers are selected.
    """
    linear = {name: module for name, module in model.named_modules() if is_linear(module)}
    if preset == "all":
        convolutions = {name: module for name, module in model.named_modules() if is_plain_convolution(module)}
        selected = linear | convolutions
    else:
        patterns = [_ATTENTION] if preset == "attention" else [_ATTENTION, _FEED_FORWARD]
        selected = {name: module for name, module in linear.items() if _matches(name, patterns)}
        if linear and not selected:
            log.info("AC-LoRA: no layer of this model is named as '%s', so all its linear layers are trained.", preset)
            selected = linear
    return {prefix + name: module for name, module in selected.items()}


def _matches(name: str, patterns: Iterable[re.Pattern[str]]) -> bool:
    return not _EXCLUDED.search(name) and any(pattern.search(name) for pattern in patterns)
