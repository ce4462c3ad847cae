"""The learning rate of every step: a warm-up, and then constant, along a line, or along a cosine.

Each is a function of the step's number alone, so a training that goes on from a checkpoint needs no state for it.
"""

from __future__ import annotations

import math

from ..config import Schedule


def learning_rate_at(step: int, steps: int, peak: float, schedule: Schedule, warm_up: int) -> float:
    """The learning rate of a step, from 0, of a training of so many steps.

    Warm-up: peak · (step + 1) / warm_up, so that its last step has the peak. Then, with the share that has been done,
    s = (step − warm_up) / (steps − warm_up), "cosine": peak · (1 + cos πs) / 2 (Loshchilov and Hutter 2016, arXiv
    1608.03983, Eq. 5), "linear": peak · (1 − s). No step has the rate 0, also not the last.
    """
    if step < warm_up:
        return peak * (step + 1) / warm_up
    done = min(1.0, (step - warm_up) / max(1, steps - warm_up))
    if schedule == "cosine":
        return peak * (1 + math.cos(math.pi * done)) / 2
    return peak * (1 - done) if schedule == "linear" else peak
