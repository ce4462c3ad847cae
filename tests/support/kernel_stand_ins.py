"""What our kernels compute, by PyTorch on the CPU, so that what calls them can be tested without a GPU."""

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def stand_ins(kernels: Any, counted: Counter[str]) -> Any:
    """A set of kernels of the given class, which counts its calls by name; those of layers are missing."""

    def geglu(hidden: Tensor) -> Tensor:
        counted["gate"] += 1
        value, gate = hidden.chunk(2, dim=-1)
        return value * F.gelu(gate)

    def gelu(x: Tensor, tanh: bool) -> Tensor:
        counted["gelu"] += 1
        return F.gelu(x, approximate="tanh" if tanh else "none")

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        counted["root mean square"] += 1
        return F.rms_norm(x, x.shape[-1:], weight, eps)

    def rotate(x: Tensor, table: Tensor) -> Tensor:
        counted["rotation"] += 1
        return (x.unflatten(-1, (-1, 1, 2)) * table).sum(-1).flatten(-2).to(x.dtype)

    def group_norm(
        x: Tensor,
        groups: int,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        silu: bool = False,
        shift: Tensor | None = None,
    ) -> Tensor:
        counted["norm and SiLU" if silu else "norm"] += 1
        if shift is not None:
            counted["shift"] += 1
            x = x + shift[:, :, None, None]
        x = F.group_norm(x, groups, weight, bias, eps).contiguous(memory_format=torch.channels_last)
        return F.silu(x) if silu else x

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        counted["rows"] += 1
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    def residual_norm(
        x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        counted["sum and rows" if added is not None else "and rows"] += 1
        x = x if added is None else x + added
        return x, F.layer_norm(x, weight.shape, weight, bias, eps)

    norms = group_norm, layer_norm, residual_norm, rms_norm
    return kernels("cpu", geglu, gelu, *norms, rotate, *[None] * 4)
