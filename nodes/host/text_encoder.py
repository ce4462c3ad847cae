"""The host's CLIP as something that learns: captions become conditionings through which gradients flow back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.clip_model
import comfy.sd1_clip
import torch

from .private_keys import CAPTION_KEY

PREFIX = "text_encoders."  # before every layer's name in the host's LoRA files


def with_caption(conditioning: Any, caption: str) -> Any:
    """A conditioning that says of which caption it is; the host ignores that."""
    return [[encoded, {**more, CAPTION_KEY: caption}] for encoded, more in conditioning]


class TextEncoder:
    """A CLIP, loaded, with the caption of each picture.

    Raises:
        ValueError: captions are not known.
    """

    def __init__(self, clip: Any, patcher: Any, conditioning: Sequence[Any]) -> None:
        self.patcher, self.captions = patcher, captions_of(conditioning)
        self._clip = clip.clone()
        self._clip.patcher, self._clip.cond_stage_model = patcher, patcher.model
        self._tokens: dict[str, Any] = {}

    @property
    def network(self) -> torch.nn.Module:
        """All of its text models."""
        network: torch.nn.Module = self.patcher.model
        return network

    def encode(self, caption: str) -> Any:
        """The conditioning of a caption by the weights as they are, as the host gives it."""
        if caption not in self._tokens:
            self._tokens[caption] = self._clip.tokenize(caption)
        return _encoded(self._clip, self._tokens[caption])

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """CLIP's layers add in place to what a norm has to remember for its gradient; for a while norms take copies."""
        with ExitStack() as undo:
            for module in self.network.modules():
                if isinstance(module, torch.nn.LayerNorm):
                    undo.callback(module.register_forward_pre_hook(_with_a_copy).remove)
            yield


def _with_a_copy(norm: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return inputs[0].clone(), *inputs[1:]


def _encoded(clip: Any, tokens: Any) -> Any:
    """What CLIP.encode_from_tokens_scheduled gives, without its loading: the weights stay where they are."""
    network = clip.cond_stage_model
    network.reset_clip_options()
    if clip.layer_idx is not None:
        network.set_clip_options({"layer": clip.layer_idx})
    network.set_clip_options({"execution_device": clip.patcher.load_device})
    encoded, pooled, *more = network.encode_token_weights(tokens)
    return [[encoded, {"pooled_output": pooled, **(more[0] if more else {})}]]


def captions_of(conditioning: Sequence[Any]) -> list[str]:
    """Each picture's caption, as the dataset node left it."""
    found = [entries[0][1].get(CAPTION_KEY) for entries in conditioning]
    if None in found:
        raise ValueError(
            f"The caption of picture {found.index(None) + 1} is not known, so the text encoder cannot learn from it. "
            "Take latents and conditioning from Load AC-LoRA Dataset, or leave Text Encoder Options out."
        )
    return found


def check_kind(clip: Any) -> None:
    """Raises ValueError where a text encoder is made of something else than CLIP's text models."""
    parts = [part for part in clip.cond_stage_model.modules() if isinstance(part, comfy.sd1_clip.SDClipModel)]
    models = [part.transformer for part in parts]
    others = [type(each).__name__ for each in models if not isinstance(each, comfy.clip_model.CLIPTextModel)]
    if others or not parts:
        what = ", ".join(dict.fromkeys(others)) or type(clip.cond_stage_model).__name__
        raise ValueError(
            f"This text encoder holds {what}, and only CLIP's own text models (as of SD1.5, SD2.1 and SDXL) can learn. "
            "Leave Text Encoder Options out: the model itself learns the style."
        )
