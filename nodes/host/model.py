"""ComfyUI's MODEL as a DiffusionModel that can be trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch
from comfy.ldm.modules.attention import GEGLU, BasicTransformerBlock, SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from torch import Tensor

from ...aclora_core.acceleration import FusableModules, WeightStream, is_linear
from ...aclora_core.diffusion import Objective
from .differentiable import unchanged_weight
from .loading import UNLIMITED, MemoryLimits
from .network_modules import network_module
from .packed_weights import is_dense
from .text_encoder import TEXT_PREFIX as TEXT_PREFIX
from .text_encoder import TextEncoder
from .tokens import Caption

# Modules that define the forward of layers without changes of their own.
_PLAIN_MODULES = ("comfy.ops", *(f"torch.nn.modules.{name}" for name in ("linear", "conv", "normalization")))
_PLAIN_CLASSES = torch.nn.Linear, torch.nn.Conv2d, torch.nn.GroupNorm, torch.nn.LayerNorm, torch.nn.RMSNorm

# Modules that view a layer's output as heads of an attention; Flux's are those of Chroma and Hunyuan too
_FLUX, _QWEN = network_module("flux.layers"), network_module("qwen_image.model")
_HEADS = (
    getattr(_FLUX, "DoubleStreamBlock", None),
    getattr(_FLUX, "SingleStreamBlock", None),
    getattr(_QWEN, "Attention", None),
)

MODEL_PREFIX = "diffusion_model."  # in front of every layer's name in ComfyUI's LoRA files


def base_name(model: Any) -> str:
    """Return ComfyUI's name for the kind of a MODEL, such as SDXL."""
    return type(getattr(getattr(model, "model", None), "model_config", None)).__name__


def _has_own_product(layer: Any) -> bool:
    """Whether a layer's weight is of a class that multiplies in its own way.

    Such are ComfyUI's quantised weights, unless a layer dequantises them, and those of other packs whose values no
    method of the layer tells.
    """
    if not hasattr(layer.weight, "__tensor_flatten__"):
        return not (is_dense(layer.weight) and is_dense(getattr(layer, "bias", None)))
    dequantises = (
        getattr(layer, "_full_precision_mm", False)
        or getattr(layer, "comfy_force_cast_weights", False)
        or bool(layer.weight_function)
    )
    return not dequantises or getattr(layer, "pre_quant_scale", None) is not None


@dataclass
class HostModel:
    """A loaded MODEL, as aclora_core.DiffusionModel."""

    patcher: Any  # ComfyUI's ModelPatcher, loaded
    device: torch.device
    objective: Objective
    options: dict[str, Any]  # the MODEL's transformer_options
    text: TextEncoder | None = None  # if it is trained too
    weight_stream: WeightStream | None = None  # if the weights do not fit on the device
    limits: MemoryLimits = UNLIMITED  # to the memory that the training may use
    prefix: str = MODEL_PREFIX

    fusable = FusableModules(GEGLU, SpatialTransformer, ResBlock, BasicTransformerBlock, _HEADS)

    @property
    def base(self) -> Any:
        """ComfyUI's BaseModel."""
        return self.patcher.model

    @property
    def base_name(self) -> str:
        """ComfyUI's name for the kind of model, such as SDXL."""
        return base_name(self.patcher)

    @property
    def network(self) -> torch.nn.Module:
        """The network whose layers get LoRA branches."""
        network: torch.nn.Module = self.base.diffusion_model
        return network

    @property
    def text_encoders(self) -> dict[str, torch.nn.Module]:
        """The text encoder, if it is trained too, by the prefix of its layers' names."""
        return {TEXT_PREFIX: self.text.network} if self.text else {}

    @property
    def dtype(self) -> torch.dtype:
        """The type that the network computes in."""
        dtype: torch.dtype = self.base.get_dtype_inference()
        return dtype

    def denoise(self, noisy: Tensor, sigma: Tensor, conditioning: dict[str, Any]) -> Tensor:
        """Predict the clean latents (x0)."""
        options = {**self.options, "cond_or_uncond": [0] * len(noisy), "sigmas": sigma}
        denoised: Tensor = self.base.apply_model(noisy, sigma, transformer_options=options, **conditioning)
        return denoised

    def encode_prompts(self, prompts: Sequence[str]) -> list[Any]:
        """Encode prompts, and last the empty prompt, with the text encoder that is being trained.

        Returns:
            ComfyUI's conditionings; an empty list if no text encoder is trained.
        """
        return [self.text.encode(Caption(prompt)) for prompt in (*prompts, "")] if self.text else []

    def is_unpatched(self, layer: torch.nn.Module) -> bool:
        """Return whether ComfyUI neither patches nor moves the layer's weight, and quantises nothing, as it computes.

        It may convert or dequantise the weight to the dtype of the input.
        """
        return (
            (isinstance(layer, _PLAIN_CLASSES) or is_linear(layer))
            and type(layer).forward.__module__ in _PLAIN_MODULES
            and set(getattr(layer, "weight_function", ())) <= {unchanged_weight}
            and not getattr(layer, "bias_function", None)
            and layer.weight.device.type == self.device.type
            and not _has_own_product(layer)
        )

    def free_memory(self, wanted: int) -> int | None:
        """Return the bytes that may be used on the GPU after ComfyUI's other models made room; None on the CPU."""
        if self.device.type == "cpu":
            return None
        loaded = comfy.model_management.current_loaded_models
        networks = [self.base, *self.text_encoders.values()]
        ours = [entry for entry in loaded if any(getattr(entry.model, "model", None) is n for n in networks)]
        comfy.model_management.free_memory(wanted + self.limits.reserved, self.device, keep_loaded=ours)
        return self.limits.free(self.device)
