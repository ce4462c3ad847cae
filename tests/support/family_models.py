"""A small random model of a family, built from ComfyUI's classes as a loader does, and its training data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

CPU = torch.device("cpu")
# Names of the output layers.
OUTPUTS = (
    "out.2.weight",
    "final_layer.linear.weight",
    "proj_out.weight",
    "head.head.weight",
    "final_linear.weight",
    "clf.1.weight",
    "out_layer.out_layer.weight",
    "norm_out.linear_2.weight",
    "nerf_final_layer_conv.conv.weight",
    "nerf_final_layer.linear.weight",
    "last.linear.weight",
    "final_layer2.linear.weight",
    "dec_net.final_layer.linear.weight",
    "final_layer.linear_1.weight",
    "final_layer.1.weight",
)


@dataclass(frozen=True)
class Family:
    """A model and the shapes of its training data."""

    config: str  # class in comfy.supported_models
    network: dict[str, Any]
    latent: tuple[int, ...]  # channels, [frames,] height, width
    text: tuple[int, int] = (7, 24)  # tokens, width
    pooled: int | None = None  # width of the pooled caption embedding
    contrast: float = 4.0  # of the two latents
    settings: dict[str, Any] = field(default_factory=dict)  # training settings that differ from the common ones
    extras: dict[str, Callable[[torch.Generator], Any]] = field(default_factory=dict)  # additional conditioning
    file: dict[str, Tensor] = field(default_factory=dict)  # tensors whose values ComfyUI reads to detect the model
    loading: Callable[[], dict[str, Any]] | None = None  # options of ComfyUI's loader, if it loads the weights
    building: Callable[[], AbstractContextManager[Any]] = nullcontext  # entered while the model is built
    dtype: torch.dtype = torch.float32  # of the weights and the computation


def build(family: Family, disable_dynamic: bool = False) -> Any:
    """Return the MODEL as a loader gives it, built in inference mode as in ComfyUI's nodes."""
    import comfy.model_patcher
    import comfy.sd
    import comfy.supported_models

    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    with torch.inference_mode():
        config = getattr(comfy.supported_models, family.config)(family.network)
        config.unet_config |= family.network  # again, as ComfyUI overwrites some with large values
        config.set_inference_dtype(family.dtype, None, device=CPU)
        with family.building():
            base = config.get_model(dict(family.file), "")
        fill(base.diffusion_model)
        if family.loading is None:
            model = kind(base, load_device=CPU, offload_device=CPU)
        else:
            weights, options = base.diffusion_model.state_dict(), family.loading()
            model = comfy.sd.load_diffusion_model_state_dict(weights, options, disable_dynamic=disable_dynamic)
    model.cached_patcher_init = (build, (family,))
    return model


@torch.no_grad()
def fill(network: nn.Module, seed: int = 0) -> None:
    """Set random weights, small ones in the output layer, so that the first prediction is small."""
    randomise(network, seed)
    weights = network.state_dict()
    (last,) = (weights[name] for name in OUTPUTS if name in weights)
    last.mul_(0.1)


@torch.no_grad()
def randomise(network: nn.Module, seed: int = 0) -> None:
    """Set random weights that keep activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in network.state_dict().items():
        if not weight.is_floating_point():
            continue
        if weight.ndim > 1:
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight[0].numel() ** -0.5)
        elif name.endswith("bias"):
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
        else:
            weight.fill_(1)  # weight of a norm


def pictures(family: Family) -> tuple[list[dict[str, Tensor]], list[Any]]:
    """Return two latents, each of one colour, and their captions, as ComfyUI's nodes output them."""
    generator = torch.Generator().manual_seed(1)
    channels, *sides = family.latent
    latents, captions = [], []
    with torch.inference_mode():
        for _ in range(2):
            colour = family.contrast * torch.randn(1, channels, *(1 for _ in sides), generator=generator)
            latents.append({"samples": colour.repeat(1, 1, *sides)})
            captions.append(caption(family, generator))
    return latents, captions


def caption(family: Family, generator: torch.Generator, tokens: int | None = None) -> Any:
    """Return a random conditioning. tokens: its length, by default the family's."""
    size = (tokens or family.text[0], family.text[1])
    pooled = torch.randn(1, family.pooled, generator=generator) if family.pooled else None
    extras = {name: make(generator) for name, make in family.extras.items()}
    return [[torch.randn(1, *size, generator=generator), {"pooled_output": pooled, **extras}]]
