"""Weights that ComfyUI made under inference mode, or quantised, as constants that autograd accepts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ...aclora_core.acceleration import is_linear
from ...aclora_core.storage import as_parameter, map_components
from .packed_weights import is_plain, make_dense
from .replaced import replaced_attribute

# ComfyUI's names of formats whose products have no backward pass, or (e5m2 by e5m2) exist on no GPU
_DEQUANTISED = {"convrot_w4a4", "float8_e5m2"}
# How a class of tensors computes that defines no operations
_BY_PYTORCH = Tensor.__torch_function__.__func__  # type: ignore[attr-defined]
_HOST_CODE = "comfy.", "torch."  # where layers are defined that know no classes of other packs


@contextmanager
def differentiable_weights(module: torch.nn.Module) -> Iterator[None]:
    """Replace the weights of a module by aliases that autograd accepts, and restore them on exit.

    The aliases share the memory of the weights. Inference tensors themselves cannot be used in autograd.
    """
    swapped: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for part in module.modules():
            stores: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
            for store in stores:
                for name, tensor in store.items():
                    if tensor is not None and (tensor.is_inference() or tensor.requires_grad):
                        swapped.append((store, name, tensor))
                        store[name] = _alias(tensor, _class_matters(part, tensor))
                        if is_linear(part):
                            make_dense(part, store[name])
        yield
    finally:
        for store, name, tensor in swapped:
            store[name] = tensor
        _forget_graphs(module)


def _forget_graphs(module: torch.nn.Module) -> None:
    """Detach tensors that a network keeps from its last run, to free the autograd graphs behind them."""
    for part in module.modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                setattr(part, name, value.detach())


def _class_matters(layer: torch.nn.Module, weight: Tensor) -> bool:
    """Return whether a weight's own class has a part in what its layer computes.

    ComfyUI's loader leaves weights of its own layers, such as norms, in the class that ComfyUI-GGUF made for layers of
    that pack. There it changes no value, but passes on to activations, and its detach() returns the tensor itself.
    """
    own = type(weight).__torch_function__
    has_operations = not inspect.ismethod(own) or own.__func__ is not _BY_PYTORCH
    return has_operations or not type(layer).__module__.startswith(_HOST_CODE)


def _alias(tensor: Tensor, keep_class: bool = True) -> Tensor:
    """Return a tensor over the same memory that autograd accepts as a constant."""
    if hasattr(tensor, "__tensor_flatten__"):  # a quantised weight, made of other tensors, without memory of its own
        alias = map_components(tensor, _alias)
    else:
        alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
        if keep_class and not is_plain(tensor):  # such as that of GGUF files, which knows its own type
            alias = alias.as_subclass(type(tensor))
            vars(alias).update(vars(tensor))
    return as_parameter(alias) if isinstance(tensor, torch.nn.Parameter) else alias


@contextmanager
def dequantised_layers(module: torch.nn.Module) -> Iterator[None]:
    """Let ComfyUI dequantise weights that cannot be used as they are, as it does where a weight has a function."""
    with ExitStack() as undo:
        for layer in module.modules():
            if getattr(layer, "quant_format", None) in _DEQUANTISED:
                undo.enter_context(replaced_attribute(layer, "weight_function", lambda own: [*own, unchanged_weight]))
        yield


def unchanged_weight(weight: Tensor) -> Tensor:
    """Return the weight; as a layer's weight function it has ComfyUI dequantise it."""
    return weight
