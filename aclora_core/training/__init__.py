"""The training loop: passes, validation, restarts, checkpoints."""

from .activity import Activity
from .candidate_store import CandidateStore, KeptResult
from .candidates import Candidates, choose, nearest_step, open_candidate_store
from .checkpoint import last_checkpoint
from .preview_files import PreviewFiles, PreviewSet
from .previews import Previews
from .progress import Progress, Result
from .requests import RequestKind, Requests
from .summary import training_summary
from .too_little_memory import TooLittleMemoryError
from .train import train

__all__ = [
    "Activity",
    "CandidateStore",
    "Candidates",
    "KeptResult",
    "PreviewFiles",
    "PreviewSet",
    "Previews",
    "Progress",
    "RequestKind",
    "Requests",
    "Result",
    "TooLittleMemoryError",
    "choose",
    "last_checkpoint",
    "nearest_step",
    "open_candidate_store",
    "train",
    "training_summary",
]
