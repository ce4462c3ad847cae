"""LoRA branches beside the model's own layers: which layers, their start, attaching and taking off again.

A branch works on what goes into and comes out of a layer, y + scale · up(down(x)). So every weight format that the
model runs in can be trained, quantised ones included.
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
from .linear import AdaptedLayer, LinearBranch
from .parameters import LoraLayer
from .shared_inputs import SharedInputs


@contextmanager
def injected(
    layers: Mapping[str, nn.Module],
    branches: Mapping[str, LoraLayer],
    is_unpatched: Callable[[nn.Module], bool] = lambda module: False,
) -> Iterator[Callable[[], None]]:
    """Adds the branches to the layers' outputs; they are taken off when the block ends, however it ends.

    is_unpatched: whether a layer computes with its own weight as it is, and nothing else. It is then computed together
    with its branch, which is faster. Gives a function to call after a first pass: from then on layers that read the
    same tensor in it are computed together.
    """
    siblings: defaultdict[str, SharedInputs] = defaultdict(SharedInputs)  # by the name of the module that they are in
    with ExitStack() as undo:
        for name, branch in branches.items():
            layer, kin = layers[name], siblings[name.rpartition(".")[0]]
            together = _together(layer, branch, kin) if is_unpatched(layer) and "forward" not in vars(layer) else None
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


def _together(layer: nn.Module, branch: LoraLayer, siblings: SharedInputs) -> Callable[[Tensor], Tensor] | None:
    """The layer's forward with the branch in it; None for a layer that is only known from outside."""
    if layer.weight.dtype != branch.down.compute.dtype:  # a layer that the host keeps in another type
        return None
    if isinstance(layer, nn.Linear):
        return siblings.add(AdaptedLayer(layer.weight, layer.bias, branch))
    return adapted_convolution(layer, branch) if can_adapt(layer) else None  # type: ignore[arg-type]


def _linear_hook(branch: LoraLayer) -> Any:
    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return LinearBranch.apply(output, inputs[0], branch.down.compute, branch.up.compute, branch)

    return add


def _convolution_hook(branch: LoraLayer) -> Any:
    def add(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        convolve = next(function for kind, function in CONVOLUTIONS.items() if isinstance(module, kind))
        down, up = branch.down.compute.to(output.dtype), branch.up.compute.to(output.dtype)
        inner = convolve(inputs[0].to(output.dtype), down, None, module.stride, module.padding, module.dilation)
        return torch.add(output, convolve(inner, up), alpha=branch.scale)

    return add
