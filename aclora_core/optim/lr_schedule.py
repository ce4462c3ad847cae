"""Learning rate schedules: warm-up, then constant, linear or cosine decay.

The learning rate is a function of the step alone, so a resumed training needs no scheduler state.
"""

from __future__ import annotations

import math

from ..config import Schedule


def learning_rate_at(step: int, steps: int, peak: float, schedule: Schedule, warmup_steps: int) -> float:
    """Return the learning rate of one step.

    Warm-up: peak · (step + 1) / warmup_steps, so the last warm-up step reaches the peak. Afterwards, with the fraction
    done s = (step − warmup_steps) / (steps − warmup_steps):

        "cosine": peak · (1 + cos πs) / 2 (Loshchilov and Hutter 2016, arXiv 1608.03983, Eq. 5)
        "linear": peak · (1 − s)
        "constant": peak

    No step below `steps` has the rate 0, not even the last.

    Args:
        step: index of the step, from 0.
        steps: planned length of the training.
        peak: the highest learning rate.
        schedule: the decay after the warm-up.
        warmup_steps: length of the warm-up; 0 for none.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    if schedule == "cosine":
        return peak * (1 + math.cos(math.pi * done)) / 2
    return peak * (1 - done) if schedule == "linear" else peak
