"""The host's MODEL with its pictures, as aclora_core.model.Model wants it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import torch
from comfy.ldm.modules.attention import GEGLU, BasicTransformerBlock, SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from torch import Tensor

from ...aclora_core.acceleration import FusableModules
from ...aclora_core.diffusion import Objective
from .conditioning import condition_of
from .conditioning_lengths import Lengths, repeated
from .text_encoder import PREFIX as TEXT_PREFIX
from .text_encoder import TextEncoder

# Where the forward of a layer is defined that does nothing of its own.
_PLAIN_MODULES = ("comfy.ops", *(f"torch.nn.modules.{name}" for name in ("linear", "conv", "normalization")))
_PLAIN_CLASSES = torch.nn.Linear, torch.nn.Conv2d, torch.nn.GroupNorm, torch.nn.LayerNorm, torch.nn.RMSNorm

PREFIX = "diffusion_model."  # before every layer's name in the host's LoRA files


@dataclass
class TrainableModel:
    """The host's MODEL and a set of captioned latents, as aclora_core.training.Model wants them."""

    patcher: Any  # the host's ModelPatcher, loaded
    device: torch.device
    latents: list[Tensor]
    conditions: list[dict[str, Any]]  # for each picture, what the host's model wants besides noise, by name
    batch_keys: list[Hashable]
    objective: Objective
    options: dict[str, Any]  # the MODEL's transformer_options
    variants: dict[int, list[int]] = field(default_factory=dict)  # of each picture, by the number of its first
    masks: dict[int, Tensor] = field(default_factory=dict)  # of the latents that have one, by number
    regularisation: dict[int, float] = field(default_factory=dict)  # what pictures outside the style count, by number
    prefix: str = PREFIX
    lengths: Lengths = field(default_factory=dict)  # to which captions of fewer tokens are repeated
    text: TextEncoder | None = None  # where it learns too

    fusable = FusableModules(GEGLU, SpatialTransformer, ResBlock, BasicTransformerBlock)

    @property
    def base(self) -> Any:
        """The host's BaseModel."""
        return self.patcher.model

    @property
    def network(self) -> torch.nn.Module:
        return self.base.diffusion_model

    @property
    def text_encoders(self) -> dict[str, torch.nn.Module]:
        return {TEXT_PREFIX: self.text.network} if self.text else {}

    @property
    def base_name(self) -> str:
        """The host's name for the kind of model, such as SDXL."""
        return type(self.base.model_config).__name__

    @property
    def commonest_shape(self) -> tuple[int, ...]:
        """Of the latents."""
        shapes = [tuple(latent.shape) for latent in self.latents]
        return max(set(shapes), key=shapes.count)

    @property
    def resolution(self) -> str:
        """Width x height in pixels of the commonest picture."""
        *_, height, width = self.commonest_shape
        pixels = self.base.latent_format.spacial_downscale_ratio
        return f"{width * pixels}x{height * pixels}"

    @property
    def dtype(self) -> torch.dtype:
        """The type that the network computes in."""
        return self.base.get_dtype_inference()

    def conditioning(self, pictures: Sequence[int]) -> dict[str, Any]:
        """What the host's model wants besides noise, by name, for pictures of one group; in main memory."""
        first, *others = [self._condition(number) for number in pictures]
        # Only pictures of one group come together, so the host joins their conditions without padding any.
        return {name: cond.concat([other[name] for other in others]) for name, cond in first.items()}

    def encoded_now(self, prompts: Sequence[str]) -> list[Any]:
        """The conditionings of prompts, and last of an empty one, by a text encoder that learns; none without one."""
        return [self.text.encode(prompt) for prompt in (*prompts, "")] if self.text else []

    def _condition(self, picture: int) -> dict[str, Any]:
        if self.text is None:
            return self.conditions[picture]
        conditioning = self.text.encode(self.text.captions[picture])
        return repeated(condition_of(self.base, conditioning, self.latents[picture], self.device), self.lengths)

    def denoise(self, noisy: Tensor, sigma: Tensor, condition: dict[str, Any]) -> Tensor:
        options = {**self.options, "cond_or_uncond": [0] * len(noisy), "sigmas": sigma}
        denoised: Tensor = self.base.apply_model(noisy, sigma, transformer_options=options, **condition)
        return denoised

    def is_unpatched(self, layer: torch.nn.Module) -> bool:
        """Whether the host neither casts, patches, quantises nor moves the layer's weight as it is used."""
        return (
            isinstance(layer, _PLAIN_CLASSES)
            and type(layer).forward.__module__ in _PLAIN_MODULES
            and not getattr(layer, "comfy_cast_weights", False)
            and not getattr(layer, "weight_function", None)
            and not getattr(layer, "bias_function", None)
            and not hasattr(layer.weight, "__tensor_flatten__")
            and layer.weight.device.type == self.device.type
        )

    def free_memory(self, wanted: int) -> int | None:
        """Bytes free on the GPU, after the host's other models have made room for so many; None on the CPU."""
        if self.device.type == "cpu":
            return None
        loaded = comfy.model_management.current_loaded_models
        networks = [self.base, *self.text_encoders.values()]
        ours = [entry for entry in loaded if any(getattr(entry.model, "model", None) is n for n in networks)]
        comfy.model_management.free_memory(wanted, self.device, keep_loaded=ours)
        return int(comfy.model_management.get_free_memory(self.device))
