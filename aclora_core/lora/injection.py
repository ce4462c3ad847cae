"""Injecting LoRA branches beside the layers of a model, and removing them.

A branch reads a layer's input and adds to its output, y + scale · up(down(x)). So a model can be trained in every
weight format that it runs in, including quantised ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..acceleration import CONVOLUTIONS, is_linear
from .convolution import adapted_convolution, can_adapt, channels_last
from .linear import AdaptedLayer, ConvertedLinear, LinearBranch
from .parameters import LoraLayer
from .shared_inputs import SharedInputs


@contextmanager
def injected(
    layers: Mapping[str, nn.Module],
    branches: Mapping[str, LoraLayer],
    is_unpatched: Callable[[nn.Module], bool] = lambda module: False,
) -> Iterator[Callable[[], None]]:
    """Add branches to the outputs of layers within a context.

    Args:
        layers: name -> layer; at least those that have a branch.
        branches: name -> branch.
        is_unpatched: whether a layer computes with its own weight and nothing else; it may convert the weight to the
            dtype of its input. Such a layer is computed together with its branch, which is faster.

    Yields:
        A function to call after a first forward pass. From then on layers that had the same input in it are computed
        together.
    """
    shared_inputs: defaultdict[str, SharedInputs] = defaultdict(SharedInputs)  # by the name of the parent module
    with ExitStack() as undo:
        for name, branch in branches.items():
            layer = layers[name]
            siblings = shared_inputs[name.rpartition(".")[0]]
            forward = None
            if is_unpatched(layer) and "forward" not in vars(layer):
                forward = _adapted_forward(layer, branch, siblings)
            if forward is None:
                hook = _linear_hook(branch) if is_linear(layer) else _convolution_hook(branch)
                undo.callback(layer.register_forward_hook(hook).remove)
                continue
            if can_adapt(layer):
                undo.enter_context(channels_last(layer))  # type: ignore[arg-type]
            layer.forward = forward
            undo.callback(delattr, layer, "forward")

        def fuse() -> None:
            for group in shared_inputs.values():
                group.fuse()

        yield fuse


def _adapted_forward(layer: Any, branch: LoraLayer, siblings: SharedInputs) -> Callable[[Tensor], Tensor] | None:
    """Return a forward that computes layer and branch; None for layers that must compute their product themselves."""
    dtype = branch.down.compute.dtype
    if is_linear(layer):
        return _in_any_dtype(layer, branch, siblings.add(AdaptedLayer(layer.weight, layer.bias, branch)))
    if layer.weight.dtype != dtype:  # the host keeps some layers in another dtype
        return None
    return adapted_convolution(layer, branch) if can_adapt(layer) else None


def _in_any_dtype(layer: Any, branch: LoraLayer, adapted: Callable[[Tensor], Tensor]) -> Any:
    """Let a layer compute an input in another dtype than its branch apart, as the output has the input's dtype."""
    add = _linear_hook(branch)

    def forward(x: Tensor) -> Tensor:
        if x.dtype == branch.down.compute.dtype:
            return adapted(x)
        result: Tensor = add(layer, (x,), ConvertedLinear.apply(x, layer.weight, layer.bias))
        return result

    return forward


def _linear_hook(branch: LoraLayer) -> Any:
    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        result: Tensor = LinearBranch.apply(output, inputs[0], branch.down.compute, branch.up.compute, branch)
        return result

    return add


def _convolution_hook(branch: LoraLayer) -> Any:
    def add(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        convolve = next(function for kind, function in CONVOLUTIONS.items() if isinstance(module, kind))
        down = branch.down.compute.to(output.dtype)
        up = branch.up.compute.to(output.dtype)
        x_down = convolve(inputs[0].to(output.dtype), down, None, module.stride, module.padding, module.dilation)
        return torch.add(output, convolve(x_down, up), alpha=branch.scale)

    return add
