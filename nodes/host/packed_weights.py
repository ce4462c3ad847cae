"""Weights of another pack's class, as those of GGUF files, whose values only their layer can compute.

ComfyUI-GGUF's layers have a method get_weight(tensor, dtype), which dequantises a weight or a bias and adds the LoRAs
that the MODEL has.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

_FEW = 256  # numbers in a tensor that may be kept as a constant


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is of PyTorch's own class."""
    return type(tensor) in (Tensor, nn.Parameter)


def has_class_of_its_own(tensor: Tensor | None) -> bool:
    """Return whether a tensor is of a class that is neither PyTorch's own nor one of ComfyUI's quantised ones."""
    return tensor is not None and not is_plain(tensor) and not hasattr(tensor, "__tensor_flatten__")


def make_dense(layer: nn.Module, tensor: Tensor) -> None:
    """Give a weight or bias of a layer a method to_dense(dtype), where the layer can compute its values."""
    get_weight: Any = getattr(layer, "get_weight", None)
    if has_class_of_its_own(tensor) and callable(get_weight):
        vars(tensor)["to_dense"] = partial(_dense, get_weight, tensor)


def is_dense(tensor: Tensor | None) -> bool:
    """Return whether a tensor is plain, or has what make_dense gives."""
    return not has_class_of_its_own(tensor) or "to_dense" in vars(tensor)


def _dense(get_weight: Callable[[Tensor, torch.dtype], Tensor], tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values as a plain tensor.

    Nobody watches the operations meanwhile: ComfyUI-GGUF fails under PyTorch's selective checkpointing.
    """
    with _disable_current_modes(), _Constants():
        return get_weight(tensor, dtype).as_subclass(Tensor)


class _Constants(TorchFunctionMode):
    """Keeps the small tensors that are made of numbers, so that nothing is copied to the GPU in a CUDA graph."""

    _kept: dict[tuple[Any, ...], Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        key = _key(func, args, kwargs)
        if key is None:
            return func(*args, **kwargs)
        if key not in self._kept:
            self._kept[key] = func(*args, **kwargs)
        return self._kept[key]


def _key(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """Return what tells a constant from others; None for any other call."""
    if func is torch.tensor and len(args) == 1 and kwargs.keys() <= {"dtype", "device"}:
        (numbers,) = args
        if isinstance(numbers, list) and len(numbers) <= _FEW and all(type(number) is int for number in numbers):
            return tuple(numbers), kwargs.get("dtype"), kwargs.get("device")
    if func is Tensor.to and len(args) == 2 and isinstance(args[1], torch.device) and not kwargs:
        constant, device = args
        if type(constant) is Tensor and constant.device.type == "cpu" != device.type and constant.numel() <= _FEW:
            return tuple(constant.flatten().tolist()), tuple(constant.shape), constant.dtype, device
    return None
