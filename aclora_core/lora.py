"""LoRA branches beside the model's own layers: which layers, their start, attaching and taking off again.

A branch works on what goes into and comes out of a layer, y + scale · up(down(x)). So every weight format that the
model runs in can be trained, quantised ones included.
"""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapter_file import Layer
from .adapter_weights import AdapterWeights, Branch
from .branch_convolution import adapted_convolution, can_adapt, channels_last
from .branch_function import AdaptedLayer, LinearBranch
from .siblings import Siblings

log = logging.getLogger("aclora")

Preset = Literal["attention", "attention and feed-forward", "all"]
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
_CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


def is_linear(module: nn.Module) -> bool:
    """Also true for the quantised layers of hosts and packs, which are no nn.Linear but look like one."""
    return isinstance(module, nn.Linear) or (hasattr(module, "in_features") and hasattr(module, "out_features"))


def _is_convolution(module: nn.Module) -> bool:
    return (
        isinstance(module, tuple(_CONVOLUTIONS))
        and getattr(module, "groups", 1) == 1
        and getattr(module, "padding_mode", "zeros") == "zeros"
    )


def find_layers(model: nn.Module, preset: Preset, prefix: str = "") -> dict[str, nn.Module]:
    """The layers that a preset means, by their full name with the prefix before it.

    "attention" and "attention and feed-forward" take the Linear layers so named; "all" takes every Linear and every
    plain convolution. A model without such names is taken whole.
    """
    linear = {name: module for name, module in model.named_modules() if is_linear(module)}
    if preset == "all":
        convolutions = {name: module for name, module in model.named_modules() if _is_convolution(module)}
        chosen = linear | convolutions
    else:
        patterns = [_ATTENTION] if preset == "attention" else [_ATTENTION, _FEED_FORWARD]
        inside = {name: module for name, module in linear.items() if not _ASIDE.search(name)}
        chosen = {name: m for name, m in inside.items() if any(pattern.search(name) for pattern in patterns)}
        if linear and not chosen:
            log.info("AC-LoRA: no layer of this model is named as '%s', so all its linear layers are trained.", preset)
            chosen = linear
    return {prefix + name: module for name, module in chosen.items()}


def make_weights(
    layers: Mapping[str, nn.Module],
    rank: int,
    alpha: float,
    generator: torch.Generator,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    ranks: Mapping[str, int] | None = None,
    strengths: Mapping[str, float] | None = None,
) -> AdapterWeights:
    """A branch for each layer: lora_down uniform in ±1/√in from the generator (on the CPU), lora_up zero.

    A rank above a layer's size is cut to it there, and alpha with it, so that the scale stays. dtype: the type that
    the model computes in. ranks: of layers that get another, with the same scale. strengths: what alpha is multiplied
    by in some layers, which then learn so much slower or faster.

    Raises:
        ValueError: no layer is as large as the rank.
    """
    sizes = {name: _sizes(module) for name, module in layers.items()}
    largest = max(min(outputs, math.prod(inputs)) for outputs, inputs in sizes.values())
    if rank > largest:
        raise ValueError(
            f"The maximum rank is {rank}, but the model's largest layer can only have rank {largest}. "
            f"Set the maximum rank to {largest} or less."
        )
    start, cut = {}, 0
    for name, (outputs, inputs) in sizes.items():
        wanted = (ranks or {}).get(name, rank)
        kept = min(wanted, outputs, math.prod(inputs))
        cut += kept < wanted
        bound = 1 / math.sqrt(math.prod(inputs))
        down = (torch.rand(kept, *inputs, generator=generator) * 2 - 1) * bound
        up = torch.zeros(outputs, kept, *(1 for _ in inputs[1:]))
        start[name] = Layer(down, up, alpha * kept / rank * (strengths or {}).get(name, 1.0))
    if cut:
        log.info("AC-LoRA: %d of %d layers are smaller than rank %d and get their own size.", cut, len(layers), rank)
    return AdapterWeights(start, device, dtype)


def _sizes(module: nn.Module) -> tuple[int, tuple[int, ...]]:
    """Output features, and input features with the kernel's sides behind them."""
    if is_linear(module):
        linear: Any = module
        return linear.out_features, (linear.in_features,)
    convolution: Any = module
    return convolution.out_channels, (convolution.in_channels, *convolution.kernel_size)


@contextmanager
def attached(
    layers: Mapping[str, nn.Module],
    branches: Mapping[str, Branch],
    is_plain: Callable[[nn.Module], bool] = lambda module: False,
) -> Iterator[Callable[[], None]]:
    """Adds the branches to the layers' outputs; they are taken off when the block ends, however it ends.

    is_plain: whether a layer computes with its own weight as it is, and nothing else. It is then computed together
    with its branch, which is faster. Gives a function to call after a first pass: from then on layers that read the
    same tensor in it are computed together.
    """
    siblings: defaultdict[str, Siblings] = defaultdict(Siblings)  # by the name of the module that they are in
    with ExitStack() as undo:
        for name, branch in branches.items():
            layer, kin = layers[name], siblings[name.rpartition(".")[0]]
            together = _together(layer, branch, kin) if is_plain(layer) and "forward" not in vars(layer) else None
            if together is not None:
                if can_adapt(layer):
                    undo.enter_context(channels_last(layer))  # type: ignore[arg-type]
                layer.forward = together
                undo.callback(delattr, layer, "forward")
            else:
                hook = _linear_hook(branch) if is_linear(layer) else _convolution_hook(branch)
                undo.callback(layer.register_forward_hook(hook).remove)

        def join() -> None:
            for kin in siblings.values():
                kin.join()

        yield join


def _together(layer: nn.Module, branch: Branch, siblings: Siblings) -> Callable[[Tensor], Tensor] | None:
    """The layer's forward with the branch in it; None for a layer that is only known from outside."""
    if layer.weight.dtype != branch.down.leaf.dtype:  # a layer that the host keeps in another type
        return None
    if isinstance(layer, nn.Linear):
        return siblings.add(AdaptedLayer(layer.weight, layer.bias, branch))
    return adapted_convolution(layer, branch) if can_adapt(layer) else None  # type: ignore[arg-type]


def _linear_hook(branch: Branch) -> Any:
    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return LinearBranch.apply(output, inputs[0], branch.down.leaf, branch.up.leaf, branch)

    return add


def _convolution_hook(branch: Branch) -> Any:
    def add(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        convolve = next(function for kind, function in _CONVOLUTIONS.items() if isinstance(module, kind))
        down, up = branch.down.leaf.to(output.dtype), branch.up.leaf.to(output.dtype)
        inner = convolve(inputs[0].to(output.dtype), down, None, module.stride, module.padding, module.dilation)
        return torch.add(output, convolve(inner, up), alpha=branch.scale)

    return add
