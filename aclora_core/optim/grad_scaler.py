"""Gradients of float16 models, kept inside its range.

Float16 ends at 6e-8, and many gradients are smaller. So the loss is multiplied before the backward pass, and the
gradient divided afterwards (Micikevicius et al. 2017, arXiv 1710.03740, section 3.2). The factor halves where a
gradient runs over at the other end, 65504, and doubles again after a while without that. Powers of two lose no digit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_START, _LEAST, _MOST = 2.0**16, 1.0, 2.0**24


_PATIENCE = 200  # steps without an overflow, after which a larger factor is tried


class GradScaler:
    """The factor, which changes on the device, so that a CUDA graph may hold what it does."""

    def __init__(self, device: torch.device) -> None:
        self.value = torch.full((), _START, device=device)
        self._good_steps = torch.zeros((), device=device)

    def can_shrink(self) -> Tensor:
        """Whether a gradient that is not finite may be so for the factor's sake."""
        return self.value > _LEAST

    @torch.no_grad()
    def update(self, good: Tensor, overflowed: Tensor) -> None:
        """Follows what became of a step: it was good, or its gradient overflowed; a loss may be neither."""
        self._good_steps.copy_(torch.where(overflowed, 0, self._good_steps + good))
        grown = self._good_steps >= _PATIENCE
        factor = torch.where(overflowed, 0.5, torch.where(grown, 2.0, 1.0))
        self.value.copy_((self.value * factor).clamp(_LEAST, _MOST))
        self._good_steps.copy_(torch.where(grown, 0, self._good_steps))

    def tensors(self) -> list[Tensor]:
        """What update changes."""
        return [self.value, self._good_steps]

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it."""
        return {"value": self.value, "good_steps": self._good_steps}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from where another one stood."""
        self.value.copy_(state["value"])
        self._good_steps.copy_(state["good_steps"])
