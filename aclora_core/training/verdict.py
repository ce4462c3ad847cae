"""Whether a training has taught its adapter anything, from what was measured while it ran.

Held-out images decide where there are some, else the training images at fixed noise. If neither was measured after step
0, the loss of the last steps decides.
"""

from __future__ import annotations

import math

from ..adapter import RankReport, fit_share, recent_loss, skipped_steps
from ..text import count_noun, percent_text

_HARDLY = 0.98  # share of the model's own loss of its images that is left where nothing was learned
_RISEN = 3.0  # times the model's own loss: more than the noise of ten steps
_TOO_FAST = "Lower learning_rate to a third or less and train again."
OUT_OF_RANGE = "Load the model in bf16 or fp32. Where that does not help, its file may be damaged: download it again."


def nothing_learned(report: RankReport) -> str:
    """Return that a training has taught nothing and what to do, as sentences; empty where it has, or nobody knows."""
    if report.losses and skipped_steps(report.losses) == len(report.losses):
        steps = count_noun(len(report.losses), "step")
        return f"It learned nothing: none of its {steps} counted, as their loss was not finite. {OUT_OF_RANGE}"
    return _of_held_out(report) or _of_own_images(report) or _of_steps(report)


def held_out_losses(report: RankReport) -> tuple[float, float] | None:
    """Return the loss of the held-out images without the adapter and with it; None where one was not measured."""
    facts, measured = report.facts, dict(report.validation)
    step = facts.best_step if facts.chosen_step is None else facts.chosen_step
    if not step or 0 not in measured or step not in measured:
        return None
    return measured[0], measured[step]


def _of_held_out(report: RankReport) -> str:
    losses = held_out_losses(report)
    if losses is None:
        return ""
    without, given = losses
    if not math.isfinite(given):
        return _no_number("its validation images")
    if given < without or not math.isfinite(without):
        return ""
    worse = (
        f"It learned nothing: unseen (validation) images are predicted worse than without the LoRA, loss {given:.3f}"
    )
    return f"{worse} instead of {without:.3f}. {_TOO_FAST}"


def _of_own_images(report: RankReport) -> str:
    fit, facts = report.fit, report.facts
    if len(fit) > 1 and not math.isfinite(fit[-1][1]) and math.isfinite(fit[0][1]):
        return _no_number("its training images")
    share = fit_share(fit)
    if share is None:
        return ""
    if share > 1:
        return (
            "It learned nothing: its training images are predicted worse than without the LoRA, with "
            f"{percent_text(share, 1)} of the base model's loss. {_TOO_FAST}"
        )
    if share >= _HARDLY and facts.cancelled is None and facts.chosen_step is None:
        return (
            f"It learned nothing: the loss of its training images is still {percent_text(share, 1)} of the base "
            "model's. Lower learning_rate if the loss jumps up and down; raise learning_rate or steps if it hardly "
            "moves."
        )
    return ""


def _of_steps(report: RankReport) -> str:
    """Judge by the loss of the last steps, where only the model alone was measured."""
    measured = report.validation or report.fit
    recent = recent_loss(report.losses)
    if len(measured) != 1 or measured[0][0] != 0 or recent is None or not recent > _RISEN * measured[0][1]:
        return ""
    return f"It learned nothing: its loss has risen from {measured[0][1]:.3f} to {recent:.3f}. {_TOO_FAST}"


def _no_number(images: str) -> str:
    return f"It learned nothing that can be used: with the LoRA the loss of {images} is not finite. {_TOO_FAST}"
