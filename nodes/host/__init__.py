"""The one place that knows ComfyUI from the inside: its MODEL as something to train, its progress bar, its cancel."""

from .families import note_on
from .opening import training, with_adapter
from .progress import Bar, accept_cancel, blocked, cancelled, hidden_node_id, raise_if_cancelled, send_text
from .sampling import draw, encoded
from .text_encoder import with_caption
from .trainable import PREFIX, TrainableModel

__all__ = [
    "PREFIX", "Bar", "TrainableModel", "accept_cancel", "blocked", "cancelled", "draw", "encoded", "hidden_node_id",
    "note_on", "raise_if_cancelled", "send_text", "training", "with_adapter", "with_caption",
]  # fmt: skip
