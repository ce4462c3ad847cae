"""The training loop: passes, validation, restarts, checkpoints."""

from .previews import Previews
from .progress import Progress, Result
from .summary import training_summary
from .train import train

__all__ = [
    "Previews",
    "Progress",
    "Result",
    "train",
    "training_summary",
]
