"""The only code that uses ComfyUI's internals: models to train, conditionings, sampling, progress and cancel."""

from .appearance import dark_theme
from .apply_lora import apply_loaded_lora, apply_trained_lora
from .batched_latents import one_image_each
from .caption_facts import dataset_name, tag_counts, trigger_word
from .conditioning import style_image_count
from .encoding_keys import KnownEncodings
from .families import training_note
from .image_features import ClipVisionFeatures, DenoiserFeatures, decode_latent, square_side, text_features
from .loading import MemoryLimits
from .model import MODEL_PREFIX, HostModel, base_name
from .model_identity import model_identity
from .preview_sampling import encode_prompts, memory_limits, sample_previews
from .private_keys import VARIANT_KEY
from .processes import processes
from .progress import (
    ProgressBar,
    block_output,
    cancelled,
    clear_interrupt,
    hidden_node_id,
    prompt_id,
    raise_if_cancelled,
    running_node_id,
    send_text,
)
from .routes import add_command, add_route, is_own_page
from .session import training_session
from .several_gpus import (
    add_last_node,
    arguments_with,
    comfyui_folder,
    free_gpu_memory,
    gpu_count,
    hidden_prompt,
    interrupt,
    packs_of,
)
from .text_encoder import with_caption
from .tiny_base import load_tiny_autoencoder, load_tiny_denoiser, load_tiny_text_encoder
from .tokens import Caption, encode_tokens, tokenize
from .told_errors import refuse_by, tell_errors, tell_refusal
from .training_set import HostTrainingSet

__all__ = [
    "Caption",
    "ClipVisionFeatures",
    "DenoiserFeatures",
    "HostModel",
    "HostTrainingSet",
    "KnownEncodings",
    "MODEL_PREFIX",
    "MemoryLimits",
    "ProgressBar",
    "VARIANT_KEY",
    "add_command",
    "add_last_node",
    "add_route",
    "apply_loaded_lora",
    "apply_trained_lora",
    "arguments_with",
    "base_name",
    "block_output",
    "cancelled",
    "clear_interrupt",
    "comfyui_folder",
    "dark_theme",
    "dataset_name",
    "decode_latent",
    "encode_prompts",
    "encode_tokens",
    "free_gpu_memory",
    "gpu_count",
    "hidden_node_id",
    "hidden_prompt",
    "interrupt",
    "is_own_page",
    "load_tiny_autoencoder",
    "load_tiny_denoiser",
    "load_tiny_text_encoder",
    "memory_limits",
    "model_identity",
    "one_image_each",
    "packs_of",
    "processes",
    "prompt_id",
    "raise_if_cancelled",
    "refuse_by",
    "running_node_id",
    "sample_previews",
    "send_text",
    "square_side",
    "style_image_count",
    "tag_counts",
    "tell_errors",
    "tell_refusal",
    "text_features",
    "tokenize",
    "training_note",
    "training_session",
    "trigger_word",
    "with_caption",
]
