"""Tensors in nested dictionaries, lists, tuples and dataclasses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor


def component_tensors(tensor: Any) -> Iterator[Tensor]:
    """The tensor itself, or those that a quantised one is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from component_tensors(getattr(tensor, name))
    else:
        yield tensor


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested dictionaries, lists, tuples and dataclasses, in a fixed order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nesting with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(item, change) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: map_tensors(getattr(value, f.name), change) for f in fields(value)})
    return value


def to_device(value: Any, device: torch.device) -> Any:
    """The same nesting with every tensor on the device."""
    return map_tensors(value, lambda tensor: tensor.to(device))


_TENSOR = "tensor of the file"  # the key that stands for a tensor in the JSON


def take_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The same nesting with the name of each tensor in its place; the tensors go into the dictionary."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()  # a copy, since none may share memory
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        return {key: take_tensors(item, f"{name}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [take_tensors(item, f"{name}/{place}", tensors) for place, item in enumerate(value)]
    return value


def put_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: put_tensors(item, tensors) for key, item in value.items()}
    return [put_tensors(item, tensors) for item in value] if isinstance(value, list) else value
