"""The training loop: passes, validation, restarts, checkpoints."""

from .candidate_store import CandidateStore, KeptResult, StepImages
from .candidates import Candidates, candidate_store, choose, nearest_step
from .previews import Previews
from .progress import Progress, Result
from .summary import training_summary
from .train import train

__all__ = [
    "CandidateStore",
    "Candidates",
    "KeptResult",
    "Previews",
    "Progress",
    "Result",
    "StepImages",
    "candidate_store",
    "choose",
    "nearest_step",
    "train",
    "training_summary",
]
