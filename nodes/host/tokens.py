"""Captions as tokens of ComfyUI's CLIP, taken as text or as prompts; and encoding them, with a cancel in between."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch

from .progress import raise_if_cancelled

_NO_IDENTIFIER = "\0"  # instead of "embedding:"; it occurs in no caption


class Caption(NamedTuple):
    """A caption and how it is read."""

    written: str
    is_text: bool = False  # rather than a prompt, in which (word:1.3) and embedding:name have a meaning


def tokenize(clip: Any, caption: Caption) -> Any:
    """Return the tokens of a caption.

    In a text, brackets and the word "embedding:" are what they are. A backslash in front of a bracket is left out
    nevertheless, as ComfyUI does where it knows no weights: programs that write tags put it there for prompts.

    Args:
        clip: ComfyUI's CLIP.
        caption: the caption.
    """
    if caption.is_text:
        clip = copy.copy(clip)
        clip.tokenizer = _plain_tokenizer(clip.tokenizer)
    return clip.tokenize(caption.written)


def encode_tokens(clip: Any, tokens: Any) -> Any:
    """Return ComfyUI's conditioning of tokens. Raises ComfyUI's interrupt on a cancel, even within a long caption."""
    with _cancellable(clip.cond_stage_model):
        return clip.encode_from_tokens_scheduled(tokens)


def _plain_tokenizer(tokenizer: Any) -> Any:
    """A copy of a tokenizer, and of those that it consists of, which knows neither weights nor embeddings."""
    plain = copy.copy(tokenizer)
    for name, part in vars(tokenizer).items():
        if hasattr(part, "tokenize_with_weights"):
            setattr(plain, name, _plain_tokenizer(part))
    if hasattr(plain, "embedding_identifier"):
        plain.disable_weights = True
        plain.embedding_identifier = _NO_IDENTIFIER
    return plain


@contextmanager
def _cancellable(network: torch.nn.Module) -> Iterator[None]:
    """Look for a cancel before each layer of a network."""
    with ExitStack() as undo:
        for module in network.modules():
            if isinstance(module, torch.nn.ModuleList):
                for layer in module:
                    undo.callback(layer.register_forward_pre_hook(lambda *_: raise_if_cancelled()).remove)
        yield
