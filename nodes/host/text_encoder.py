"""ComfyUI's CLIP as a text encoder that is trained: conditionings that gradients flow through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.clip_model
import comfy.sd1_clip
import torch

from .private_keys import CAPTION_KEY, DATASET, TEXT_KEY, TRIGGER
from .tokens import Caption, tokenize

TEXT_PREFIX = "text_encoders."  # in front of every layer's name in ComfyUI's LoRA files


def with_caption(conditioning: Any, caption: str, is_text: bool = False, trigger: str = "", dataset: str = "") -> Any:
    """Return the conditioning with its caption recorded in it, which ComfyUI ignores.

    Args:
        conditioning: of the caption.
        caption: as it is written.
        is_text: whether it was encoded as text, without prompt syntax.
        trigger: the trigger word of the dataset, if there is one.
        dataset: the name of its folder, if it is from one.
    """
    facts: dict[str, Any] = {CAPTION_KEY: caption}
    if is_text:
        facts[TEXT_KEY] = True
    if trigger:
        facts[TRIGGER] = trigger
    if dataset:
        facts[DATASET] = dataset
    return [[encoded, {**more, **facts}] for encoded, more in conditioning]


class TextEncoder:
    """A loaded CLIP that is trained, with the caption of each image.

    Args:
        clip: ComfyUI's CLIP, for its tokenizer and options.
        patcher: ComfyUI's ModelPatcher of the network to train.
        conditioning: of each image, with its caption recorded.

    Raises:
        ValueError: a caption is not recorded.
    """

    def __init__(self, clip: Any, patcher: Any, conditioning: Sequence[Any]) -> None:
        self.patcher = patcher
        self.captions = recorded_captions(conditioning)
        self._clip = clip.clone()
        self._clip.patcher = patcher
        self._clip.cond_stage_model = patcher.model
        self._tokens: dict[Caption, Any] = {}

    @property
    def network(self) -> torch.nn.Module:
        """The network with all text models of the CLIP."""
        network: torch.nn.Module = self.patcher.model
        return network

    def encode(self, caption: Caption) -> Any:
        """Return ComfyUI's conditioning of a caption, computed with the current weights."""
        if caption not in self._tokens:
            self._tokens[caption] = tokenize(self._clip, caption)
        return _encode_tokens(self._clip, self._tokens[caption])

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """Let norms take copies, since CLIP's layers add in place to the tensor that a norm saves for its backward."""
        with ExitStack() as undo:
            for module in self.network.modules():
                if isinstance(module, torch.nn.LayerNorm):
                    undo.callback(module.register_forward_pre_hook(_copy_input).remove)
            yield


def _copy_input(norm: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return inputs[0].clone(), *inputs[1:]


def _encode_tokens(clip: Any, tokens: Any) -> Any:
    """Return the output of CLIP.encode_from_tokens_scheduled without loading the model, so weights stay in place."""
    network = clip.cond_stage_model
    network.reset_clip_options()
    if clip.layer_idx is not None:
        network.set_clip_options({"layer": clip.layer_idx})
    network.set_clip_options({"execution_device": clip.patcher.load_device})
    encoded, pooled, *more = network.encode_token_weights(tokens)
    return [[encoded, {"pooled_output": pooled, **(more[0] if more else {})}]]


def recorded_captions(conditioning: Sequence[Any]) -> list[Caption]:
    """Return each image's caption, as recorded by the dataset node.

    Raises:
        ValueError: a caption is not recorded.
    """
    facts = [entries[0][1] for entries in conditioning]
    for number, own in enumerate(facts, start=1):
        if own.get(CAPTION_KEY) is None:
            raise ValueError(
                f"The caption of image {number} is not known, so the text encoder cannot learn from it. Take latents "
                "and conditioning from Load AC-LoRA Dataset, or remove AC-LoRA Text Encoder Options."
            )
    return [Caption(own[CAPTION_KEY], own.get(TEXT_KEY, False)) for own in facts]


def check_text_encoder(clip: Any) -> None:
    """Check that a text encoder consists of CLIP's text models only. Raises ValueError if it does not."""
    parts = [part for part in clip.cond_stage_model.modules() if isinstance(part, comfy.sd1_clip.SDClipModel)]
    models = [part.transformer for part in parts]
    others = [type(each).__name__ for each in models if not isinstance(each, comfy.clip_model.CLIPTextModel)]
    if others or not parts:
        what = ", ".join(dict.fromkeys(others)) or type(clip.cond_stage_model).__name__
        raise ValueError(
            f"This text encoder contains {what}, and only CLIP's own text models (of SD1.5, SD2.1 and SDXL) can be "
            "trained. Remove AC-LoRA Text Encoder Options: the model itself learns the style."
        )
