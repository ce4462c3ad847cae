"""Pictures drawn with the model as it is, while it trains."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ..text import error_reason

if TYPE_CHECKING:
    from .trainer import TrainingPass

log = logging.getLogger("aclora")


@dataclass
class Previews:
    """Draws every so many steps, and no more once that has failed: a training is worth more than its previews.

    Where drawing has taken more than its share of the time since the start, a set is left out; the first never is.
    """

    every: int  # steps
    draw: Callable[[int], None]  # told the steps done; the adapter is on the model, and nothing asks for gradients
    share: float = 1.0  # of the time
    seconds: float = 0.0  # that drawing took
    left_out: int = 0  # sets
    failed: bool = False
    started: float = field(default_factory=lambda: time.monotonic())

    def run(self, work: TrainingPass, done: int) -> str:
        """Draws where it is time; gives a sentence where that fails."""
        if self.failed or done % self.every:
            return ""
        began = time.monotonic()
        if self.seconds > self.share * (began - self.started):
            self.left_out += 1
            return ""
        try:
            with work.lent(), torch.no_grad():
                self.draw(done)
        except Exception as error:  # whatever a host's sampler raises
            self.failed = True
            reason = error_reason(error)
            sentence = f"Step {done}: no preview could be drawn ({reason}). Training goes on without previews."
            log.warning("AC-LoRA: %s", sentence)
            return sentence
        finally:
            self.seconds += time.monotonic() - began
        return ""
