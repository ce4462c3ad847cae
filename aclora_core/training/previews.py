"""Images drawn with the model as it is, while it trains."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..storage import write_advice
from ..text import error_reason
from .preview_files import PreviewFiles
from .trainer import Trainer

log = logging.getLogger("aclora")


@dataclass
class Previews:
    """Draws previews every few steps, and none any more once that has failed: a training is worth more.

    Where drawing has taken more than its share of the time since the start, a set is skipped; the first never is.
    """

    every: int  # steps
    # Called with the step of the pass, without gradients, with the adapter on the model; returns the images, if any.
    draw: Callable[[int], Sequence[Tensor] | None]
    share: float = 1.0  # of the time, at most
    files: PreviewFiles | None = None  # where each set is kept
    seconds: float = 0.0  # that drawing took
    left_out: int = 0  # sets that were skipped
    failed: bool = False
    latest: Sequence[Tensor] = ()  # images of the last set
    started: float = field(default_factory=lambda: time.monotonic())

    def draw_if_due(self, trainer: Trainer, step: int) -> str:
        """Draw where it is time; return a sentence for the user where that fails, else an empty one."""
        if self.failed or step % self.every:
            return ""
        if self.seconds > self.share * (time.monotonic() - self.started):
            self.left_out += 1
            return ""
        return self.draw_now(trainer, step)

    def draw_now(self, trainer: Trainer, step: int) -> str:
        """Draw and keep a set, unless drawing has failed before; return a sentence for the user where it fails now.

        step: that the weights are of; 0 before the training.
        """
        self.latest = ()
        if self.failed:
            return ""
        began = time.monotonic()
        try:
            with trainer.lent(), torch.no_grad():
                self.latest = self.draw(step) or ()
        except Exception as error:  # whatever a host's sampler raises
            self.failed = True
            sentence = (
                f"Step {step}: no preview could be drawn ({error_reason(error)}). Training goes on without previews."
            )
            log.warning("AC-LoRA: %s", sentence)
            return sentence
        else:
            return self._keep(step)
        finally:
            self.seconds += time.monotonic() - began

    def _keep(self, step: int) -> str:
        """Write the last set; return a sentence for the user where that fails."""
        if self.files is None:
            return ""
        try:
            self.files.write(step, self.latest)
        except OSError as error:
            log.warning("AC-LoRA: step %d: the previews could not be kept, as %s.", step, error.strerror or error)
            return f"Some previews could not be saved: {write_advice(error)}; training goes on and tries again."
        return ""
