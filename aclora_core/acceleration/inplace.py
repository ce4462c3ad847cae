"""For models that overwrite what their own backward pass still needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class NoInplaceAdd(TorchFunctionMode):
    """Has x += y make a new tensor for as long as the context lasts.

    Some networks add to their activations in place, which costs nothing when drawing but takes from a norm the input
    that its gradient is computed from. Only to be used where a model fails otherwise: x.add_(y) whose result nobody
    takes would do nothing.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.add_ and torch.is_grad_enabled():
            func = torch.add
        return func(*args, **(kwargs or {}))


class InplaceAddLog(TorchFunctionMode):
    """Remembers what x += y has written into, for a step that may fail for it.

    What a failed step saved for its way back holds such an x, and that holds the step: without help neither is ever
    freed, nor the model's weights with them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._tensors: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.add_ and torch.is_grad_enabled():
            self._tensors.append(args[0])
        return func(*args, **(kwargs or {}))

    def let_go(self) -> None:
        """Takes the step from the tensors."""
        for tensor in self._tensors:
            if not tensor._is_view():
                tensor.detach_()
        self._tensors.clear()
