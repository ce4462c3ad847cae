"""The training loop: passes, validation, restarts, checkpoints."""

from .activity import Activity
from .candidate_store import CandidateStore, KeptResult, StepImages
from .candidates import Candidates, choose, nearest_step, open_candidate_store
from .previews import Previews
from .progress import Progress, Result
from .summary import training_summary
from .train import train

__all__ = [
    "Activity",
    "CandidateStore",
    "Candidates",
    "KeptResult",
    "Previews",
    "Progress",
    "Result",
    "StepImages",
    "choose",
    "nearest_step",
    "open_candidate_store",
    "train",
    "training_summary",
]
