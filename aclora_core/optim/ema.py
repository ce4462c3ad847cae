"""The running average of an adapter over its last steps (EMA): steadier than the weights of any one of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..lora import FlatParameters


class Ema:
    """average ← d · average + (1 − d) · weights after each step, with d = min(decay, (1 + n) / (10 + n)) at its n-th.

    The warm-up of d lets the average leave its start, an adapter that does nothing, as fast as the weights do.
    """

    def __init__(self, weights: FlatParameters, decay: float) -> None:
        self._weights, self.decay = weights, decay
        self.value = weights.master.clone()
        self._last_good = weights.master.clone()  # before the last step that counted; see Stepper
        self._steps = torch.zeros((), device=weights.master.device)

    @torch.no_grad()
    def update(self, good: Tensor) -> None:
        """Takes a step's weights into the average, on the device; a step that was not good counts as none."""
        torch.where(good, self.value, self._last_good, out=self._last_good)
        self._steps += good
        decay = ((1 + self._steps) / (10 + self._steps)).clamp_max(self.decay)
        followed = torch.lerp(self.value, self._weights.master, 1 - decay)
        torch.where(good, followed, self.value, out=self.value)

    @torch.no_grad()
    def restart(self, spans: Iterable[slice]) -> None:
        """Begins anew where a restart has drawn factors anew.

        What was averaged there are weights that are gone, and the mean of old and new noise is neither; so these
        factors begin at their new weights. lora_down and lora_up only mean something together: give the spans of both.
        The warm-up begins again for all, as with a high decay the new start would otherwise rule the average for a
        thousand steps; untouched layers merely follow a little faster for a while.
        """
        spans = list(spans)
        for span in spans:
            self.value[span] = self._weights.master[span]
        if spans:
            self._steps.zero_()

    def restore_last_good(self) -> None:
        """Goes back to before the last step that counted."""
        self.value.copy_(self._last_good)

    def tensors(self) -> list[Tensor]:
        """What update changes."""
        return [self.value, self._last_good, self._steps]

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it."""
        return {"value": self.value, "last_good": self._last_good, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from where another one stood."""
        self.value.copy_(state["value"])
        self._last_good.copy_(state["last_good"])
        self._steps.copy_(state["steps"])
