"""For models that overwrite what their own backward pass still needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class OutOfPlace(TorchFunctionMode):
    """Has x += y make a new tensor for as long as the context lasts.

    Some networks add to their activations in place, which costs nothing when drawing but takes from a norm the input
    that its gradient is computed from. Only to be used where a model fails otherwise: x.add_(y) whose result nobody
    takes would do nothing.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.add_ and torch.is_grad_enabled():
            func = torch.add
        return func(*args, **(kwargs or {}))
