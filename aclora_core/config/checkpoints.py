"""Settings of checkpoints: where and how often a training is saved, and whether it resumes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Resume = Literal["never", "if there is a checkpoint", "for more steps"]


@dataclass(frozen=True)
class CheckpointConfig:
    """Where and how often a training is saved, and whether it resumes from its last checkpoint.

    Raises:
        ValueError: a value is out of its range.
    """

    folder: Path  # of this training alone
    every: int = 50  # steps; a checkpoint is also written at a cancel and at the end of a pass
    keep: int = 2  # number of latest checkpoints that are kept
    resume: Resume = "if there is a checkpoint"

    def __post_init__(self) -> None:
        for name in ("every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"Checkpoints: {name} must be 1 or more, but is {getattr(self, name)}.")
        if self.resume not in get_args(Resume):
            raise ValueError(f"resume must be {' or '.join(get_args(Resume))}, but is '{self.resume}'.")
