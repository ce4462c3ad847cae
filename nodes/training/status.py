"""What the training node says in words: before the first step, while it trains, after a cancel, and at the end.

A new line of the live text is a line in `status_text`.
"""

from __future__ import annotations

import re
from typing import Literal

from ...aclora_core.adapter import RankReport, Stage, fit_share, recent_loss
from ...aclora_core.config import CheckpointConfig
from ...aclora_core.text import percent_text
from ...aclora_core.training import Activity, Progress, training_summary
from .. import host

CANCELLED = "Cancelled: finishing what is under way. What was learned is kept."
STREAMED_INSTEAD = "No step fits beside the model's weights: they are streamed from main memory."
NOT_TRAINED = "Not trained, as this run was cancelled before. Run again to train."

_STAGE_TEXT: dict[Stage, str] = {
    "training": "training",
    "cutting": "finding the smallest size",
    "training on all": "second pass, on all images",
    "comparing": "drawing unseen prompts with and without the LoRA",
}
_ACTIVITY_TEXT: dict[Activity | Literal["loading"], str] = {
    "loading": "Loading the model",
    "checkpoint": "Looking for a checkpoint",
    "trial step": "Trying one step",
    "kernels": "Compiling kernels, once for each kind of model",
    "memory": "Measuring how much memory a step takes",
    "first step": "First step, which takes longer than the others",
    "measuring": "Measuring the loss",
    "previews": "Drawing previews",
    "truncating": "Truncating each layer to the rank it uses",
    "report": "Counting the ranks of the layers",
}


def activity_text(activity: Activity | Literal["loading"]) -> str:
    """Return what is being done where that is no step; after a cancel also that the work is kept."""
    text = f"{_ACTIVITY_TEXT[activity]} …"
    return f"{CANCELLED}\n{text}" if host.cancelled() else text


def status_text(progress: Progress, bar: host.ProgressBar) -> str:
    """Return the text below the chart while a training runs: stage, losses, time left, memory, latest note."""
    lines = [_now(progress, bar)]
    if progress.memory:
        lines.append(progress.memory)
    lines += progress.notes[-1:]
    return "\n".join(lines)


def _now(progress: Progress, bar: host.ProgressBar) -> str:
    """Return where the training stands, in one line."""
    loss = recent_loss(progress.losses)
    parts = [_STAGE_TEXT[progress.stage], "no finite loss" if loss is None else f"loss {loss:.3f}"]
    if host.cancelled():
        parts.insert(0, "cancelled")
    if progress.validation:
        parts.append(f"validation loss {progress.validation[-1][1]:.3f}")
    share = fit_share(progress.fit)
    if share is not None:
        parts.append(f"training images at {percent_text(share)} of the base model's loss")
    parts.append(f"learning rate {progress.learning_rate:.2g}")
    if progress.skipped_steps:
        parts.append(f"skipped steps: {progress.skipped_steps}")
    if progress.resumed_at:
        parts.append(f"resumed at step {progress.resumed_at}")
    if time_left := bar.time_left(progress.done):
        # A second pass is as long as the first took to its best step, which is not known yet.
        parts.append(f"up to {time_left}" if progress.remaining else time_left)
    return ", ".join(parts)


def headline(result: str, cancelled: bool) -> str:
    """Return the sentences of a result for the node, beside the picture of the training, which has all of them.

    Args:
        result: as from `result_text`.
        cancelled: then its last sentence says what to do next.
    """
    first, *others = re.split(r"(?<=\.) ", result)
    return " ".join([first, *(others[-1:] if cancelled else others[:1])])


def result_text(report: RankReport, checkpoints: CheckpointConfig | None) -> str:
    """Return the summary of a training that has ended; after a cancel also what to do next.

    Args:
        report: of the training.
        checkpoints: of the training, if it has any.
    """
    summary = training_summary(report)
    if report.facts.cancelled is None:
        return summary
    resumes = checkpoints is not None and checkpoints.resume != "never"
    return f"{summary} Run again to {'resume' if resumes else 'train from the start'}."
