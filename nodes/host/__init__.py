"""The one place that knows ComfyUI from the inside: its MODEL as something to train, its progress bar, its cancel."""

from .families import note_on
from .model import PREFIX, TrainableModel
from .preview_sampling import draw, encoded
from .progress import Bar, accept_cancel, blocked, cancelled, hidden_node_id, raise_if_cancelled, send_text
from .session import training, with_adapter
from .text_encoder import with_caption

__all__ = [
    "PREFIX",
    "Bar",
    "TrainableModel",
    "accept_cancel",
    "blocked",
    "cancelled",
    "draw",
    "encoded",
    "hidden_node_id",
    "note_on",
    "raise_if_cancelled",
    "send_text",
    "training",
    "with_adapter",
    "with_caption",
]
