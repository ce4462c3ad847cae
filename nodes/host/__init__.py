"""The one place that knows ComfyUI from the inside: its MODEL as something to train, its progress bar, its cancel."""

from .apply_lora import applied, with_adapter
from .encoding_keys import KnownEncodings
from .families import note_on
from .model import PREFIX, HostModel
from .preview_sampling import draw, encoded
from .private_keys import VARIANT_KEY
from .progress import Bar, accept_cancel, blocked, cancelled, hidden_node_id, raise_if_cancelled, send_text
from .session import training_session
from .text_encoder import with_caption
from .tiny_base import load_tiny_autoencoder, load_tiny_denoiser, load_tiny_text_encoder
from .training_set import HostTrainingSet

__all__ = [
    "Bar",
    "HostModel",
    "HostTrainingSet",
    "KnownEncodings",
    "PREFIX",
    "VARIANT_KEY",
    "accept_cancel",
    "applied",
    "blocked",
    "cancelled",
    "draw",
    "encoded",
    "hidden_node_id",
    "load_tiny_autoencoder",
    "load_tiny_denoiser",
    "load_tiny_text_encoder",
    "note_on",
    "raise_if_cancelled",
    "send_text",
    "training_session",
    "with_adapter",
    "with_caption",
]
