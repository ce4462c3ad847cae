"""The only code that uses ComfyUI's internals: models to train, conditionings, sampling, progress and cancel."""

from .apply_lora import apply_loaded_lora, apply_trained_lora
from .caption_facts import dataset_name, tag_counts, trigger_word
from .encoding_keys import KnownEncodings
from .families import training_note
from .image_features import ClipVisionFeatures, DenoiserFeatures, decode_latent, square_side, text_features
from .model import MODEL_PREFIX, HostModel
from .model_identity import model_identity
from .preview_sampling import encode_prompts, sample_previews
from .private_keys import VARIANT_KEY
from .progress import (
    ProgressBar,
    block_output,
    cancelled,
    clear_interrupt,
    hidden_node_id,
    raise_if_cancelled,
    send_text,
)
from .routes import add_waiting_route
from .session import training_session
from .text_encoder import with_caption
from .tiny_base import load_tiny_autoencoder, load_tiny_denoiser, load_tiny_text_encoder
from .tokens import Caption, encode_tokens, tokenize
from .training_set import HostTrainingSet

__all__ = [
    "Caption",
    "ClipVisionFeatures",
    "DenoiserFeatures",
    "HostModel",
    "HostTrainingSet",
    "KnownEncodings",
    "MODEL_PREFIX",
    "ProgressBar",
    "VARIANT_KEY",
    "add_waiting_route",
    "apply_loaded_lora",
    "apply_trained_lora",
    "block_output",
    "cancelled",
    "clear_interrupt",
    "dataset_name",
    "decode_latent",
    "encode_prompts",
    "encode_tokens",
    "hidden_node_id",
    "load_tiny_autoencoder",
    "load_tiny_denoiser",
    "load_tiny_text_encoder",
    "model_identity",
    "raise_if_cancelled",
    "sample_previews",
    "send_text",
    "square_side",
    "tag_counts",
    "text_features",
    "tokenize",
    "training_note",
    "training_session",
    "trigger_word",
    "with_caption",
]
