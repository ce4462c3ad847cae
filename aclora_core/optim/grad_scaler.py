"""Dynamic loss scaling, which keeps the gradients of float16 models inside float16's range.

Float16 ends at 6e-8, and many gradients are smaller. So the loss is multiplied by a scale before the backward pass, and
the gradient divided by it afterwards (Micikevicius et al. 2017, arXiv 1710.03740, section 3.2). The scale halves when a
gradient exceeds float16's largest number, 65504, and doubles after a while without such an overflow. It is a power of
two, so scaling does not round.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_INITIAL_SCALE = 2.0**16
_MIN_SCALE = 1.0
_MAX_SCALE = 2.0**24
_GROWTH_INTERVAL = 200  # steps without an overflow before the scale doubles


class GradScaler:
    """A loss scale that is kept and updated on the device, so that a CUDA graph can capture its update."""

    def __init__(self, device: torch.device) -> None:
        self.value = torch.full((), _INITIAL_SCALE, device=device)
        self._good_steps = torch.zeros((), device=device)

    def can_shrink(self) -> Tensor:
        """Scalar bool: whether a smaller scale could still prevent an overflow."""
        return self.value > _MIN_SCALE

    @torch.no_grad()
    def update(self, good: Tensor, overflowed: Tensor) -> None:
        """Adapt the scale after a step.

        Args:
            good: scalar bool; loss and gradient were finite.
            overflowed: scalar bool; the loss was finite and the gradient was not. A loss that is not finite is neither.
        """
        self._good_steps.copy_(torch.where(overflowed, 0, self._good_steps + good))
        grows = self._good_steps >= _GROWTH_INTERVAL
        factor = torch.where(overflowed, 0.5, torch.where(grows, 2.0, 1.0))
        self.value.copy_((self.value * factor).clamp(_MIN_SCALE, _MAX_SCALE))
        self._good_steps.copy_(torch.where(grows, 0, self._good_steps))

    def tensors(self) -> list[Tensor]:
        """Tensors that update changes in place."""
        return [self.value, self._good_steps]

    def state_dict(self) -> dict[str, Tensor]:
        """State for a checkpoint; the tensors are not copied."""
        return {"value": self.value, "good_steps": self._good_steps}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a state_dict in place."""
        self.value.copy_(state["value"])
        self._good_steps.copy_(state["good_steps"])
