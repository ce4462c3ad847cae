"""Frozen weights in the dtype that a model computes in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..acceleration import find_kernels

_FLOAT8 = torch.float8_e4m3fn, torch.float8_e5m2


def dense_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight as a plain tensor of a dtype: itself, or converted from a shorter type or a quantised format.

    A weight of a class of its own has its values from a method to_dense(dtype), which the host gives it.
    """
    if to_dense := vars(weight).get("to_dense"):
        return to_dense(dtype)
    if hasattr(weight, "__tensor_flatten__"):  # a tensor made of others, as quantised ones are
        quantised: Any = weight
        dequantised: Tensor = quantised.dequantize()
        return dequantised.to(dtype)
    if weight.dtype == dtype:
        return weight
    return _from_float8(weight, dtype) if weight.dtype in _FLOAT8 else weight.to(dtype)


def _from_float8(weight: Tensor, dtype: torch.dtype) -> Tensor:
    kernels = find_kernels(weight.device, dtype, "lora")
    bits, output = weight.view(torch.uint8), torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if kernels is None or not kernels.from_float8.supports(output, bits):
        return weight.to(dtype)
    kernels.from_float8(output, bits, weight.dtype == torch.float8_e5m2)
    return output
