"""In-place additions of models that overwrite what their own backward pass still needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class NoInplaceAdd(TorchFunctionMode):
    """Make x += y allocate a new tensor while the mode is active and gradients are enabled.

    Some networks add to their activations in place. That is harmless in sampling, but in training it overwrites the
    input a norm has saved for its backward pass. Use it only for models that fail otherwise: a call x.add_(y) whose
    result is not assigned has no effect.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.add_ and torch.is_grad_enabled():
            func = torch.add
        return func(*args, **(kwargs or {}))


class InplaceAddLog(TorchFunctionMode):
    """Record the tensors that x += y overwrites, for a step that may fail because of it.

    The saved tensors of the failed step include such an x, whose history is that step: a reference cycle that is never
    freed, and keeps the model's weights alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self._tensors: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.add_ and torch.is_grad_enabled():
            self._tensors.append(args[0])
        return func(*args, **(kwargs or {}))

    def detach_all(self) -> None:
        """Detach the recorded tensors, so that the failed step's graph can be freed."""
        for tensor in self._tensors:
            if not tensor._is_view():
                tensor.detach_()
        self._tensors.clear()
