"""What a fused kernel consists of, and what kernels share with their callers. Loads no Triton."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from ...storage import tensors_in

KernelGroup = Literal["lora", "unet", "transformer"]  # kernels that are compiled and tested together
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of activations
HALF_DTYPES = (torch.bfloat16, torch.float16)
MAX_LAYERS = 3  # layers that the kernels of linear layers compute in one launch
MAX_RANK = 64  # of a LoRA branch
MAX_ROW_WIDTH = 4096  # elements of a row, for kernels whose programs hold whole rows
MAX_KEYS = 128  # of short_key_attention

Draw = Callable[..., Tensor]  # standard normal numbers of a shape, in the dtype and on the device under test

_P = ParamSpec("_P")
_Q = ParamSpec("_Q")
_R = TypeVar("_R")


class ConvParams(NamedTuple):
    """Stride, padding and dilation of a 2D convolution, each as (height, width)."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


@dataclass(frozen=True)
class Kernel(Generic[_P, _Q, _R]):
    """A fused operation, with all that is needed to test it and to decide where to use it.

    Attributes:
        group: the kernels it is compiled and tested with.
        operation: the fused operation.
        limits: whether it supports some inputs, and is faster than PyTorch for them. Takes some of the operation's
            parameters, under the same names. Device and dtype of the first tensor are checked apart from it.
        reference: the operation in plain PyTorch, with the same parameters, in-place changes and gradients.
        examples: small inputs for tests, each the arguments of one call in their order.
        device: the type of the devices it is to run on, such as "cuda"; empty until `on` names one.
    """

    group: KernelGroup
    operation: Callable[_P, _R]
    limits: Callable[_Q, bool]
    reference: Callable[_P, _R]
    examples: Callable[[Draw], Iterable[tuple[Any, ...]]]
    device: str = ""

    def on(self, device: str) -> Kernel[_P, _Q, _R]:
        """Return the kernel for a type of device."""
        return replace(self, device=device)

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Run the fused operation."""
        return self.operation(*args, **kwargs)

    def supports(self, *args: _Q.args, **kwargs: _Q.kwargs) -> bool:
        """Return whether the operation runs on these inputs' device, and its limits allow them."""
        first = next(tensors_in(args))
        return first.device.type == self.device and first.dtype in DTYPES and self.limits(*args, **kwargs)
