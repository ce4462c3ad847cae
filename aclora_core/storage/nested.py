"""Tensors inside nested dictionaries, lists, tuples and dataclasses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

# In the JSON of a checkpoint a dictionary with this single key stands for a tensor; the text is part of the format.
_TENSOR_KEY = "tensor of the file"


def component_tensors(tensor: Any) -> Iterator[Tensor]:
    """Yield the tensor itself, or the plain tensors that a quantised one is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from component_tensors(getattr(tensor, name))
    else:
        yield tensor


def map_components(tensor: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a quantised tensor made anew of changed tensors; its device is theirs."""
    names, facts = tensor.__tensor_flatten__()
    inner = {name: change(getattr(tensor, name)) for name in names}
    return type(tensor).__tensor_unflatten__(inner, facts, tensor.size(), tensor.stride())


def as_parameter(tensor: Tensor) -> Tensor:
    """Return a tensor as a constant parameter of a module.

    PyTorch detaches a tensor of another class for that, and a quantised one then copies its scales. Such a tensor is
    marked as a parameter instead, so that what it is made of stays the same.
    """
    if type(tensor) is Tensor:
        return torch.nn.Parameter(tensor, requires_grad=False)
    tensor._is_param = True
    return tensor


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a nested value in a fixed order."""
    if isinstance(value, Tensor):
        yield value
        return
    for child in (_children(value) or {}).values():
        yield from tensors_in(child)


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return the nested value with every tensor replaced by `change(tensor)`; everything else is kept."""
    return _map_with_path(value, lambda _, tensor: change(tensor), "")


def to_device(value: Any, device: torch.device) -> Any:
    """Return the nested value with every tensor on the device."""
    return map_tensors(value, lambda tensor: tensor.to(device))


def take_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Split a nested value into JSON and named tensors; `put_tensors` joins them again.

    Args:
        value: dictionaries with text keys, lists, tuples, tensors, and what JSON can hold.
        name: where the value lies, as a prefix of its tensors' names.
        tensors: receives a contiguous copy of each tensor in main memory, under its path: "name/key/0".

    Returns:
        The nested value with a placeholder for each tensor. As everywhere in JSON, tuples come back as lists.
    """

    def take(path: str, tensor: Tensor) -> dict[str, str]:
        # A copy, since tensors in a safetensors file must not share memory.
        tensors[path] = tensor.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR_KEY: path}

    return _map_with_path(value, take, name)


def put_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the nested value that `take_tensors` split, after its JSON was read back.

    Raises:
        KeyError: a tensor is missing.
    """
    if isinstance(value, dict) and value.keys() == {_TENSOR_KEY}:
        return tensors[value[_TENSOR_KEY]]
    children = _children(value)
    if children is None:
        return value
    return _rebuild(value, {key: put_tensors(child, tensors) for key, child in children.items()})


def _map_with_path(value: Any, change: Callable[[str, Tensor], Any], path: str) -> Any:
    if isinstance(value, Tensor):
        return change(path, value)
    children = _children(value)
    if children is None:
        return value
    return _rebuild(value, {key: _map_with_path(child, change, f"{path}/{key}") for key, child in children.items()})


def _children(value: Any) -> dict[Any, Any] | None:
    """The direct children of a container, by key, index or field; None for anything else."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return None


def _rebuild(container: Any, children: dict[Any, Any]) -> Any:
    """A container of the same kind with other children."""
    if isinstance(container, dict):
        return children
    if hasattr(container, "_make"):  # a named tuple
        return container._make(children.values())
    if isinstance(container, list | tuple):
        return type(container)(children.values())
    return replace(container, **children)
