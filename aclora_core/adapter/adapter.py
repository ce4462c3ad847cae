"""A LoRA in memory: its layers, its metadata, and tensors of other kinds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Layer:
    """The low-rank update of one weight: delta = scale * up @ down.

    Raises:
        ValueError: the two factors have different ranks, or have no rank.
    """

    lora_down: Tensor  # (rank, in), or (rank, in, kh, kw) for a convolution
    lora_up: Tensor  # (out, rank), or (out, rank, 1, 1)
    alpha: float

    def __post_init__(self) -> None:
        down, up = tuple(self.lora_down.shape), tuple(self.lora_up.shape)
        has_matrices = len(down) >= 2 and len(up) >= 2 and 0 not in down + up
        if not has_matrices or up[1] != down[0] or any(size != 1 for size in up[2:]):
            raise ValueError(
                f"lora_up {up} and lora_down {down} do not fit together: they must be (out, rank) and (rank, in)"
            )

    @property
    def rank(self) -> int:
        """Rows of lora_down."""
        return self.lora_down.shape[0]

    @property
    def scale(self) -> float:
        """The factor alpha / rank on the delta."""
        return self.alpha / self.rank

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return lora_down as (rank, in * kh * kw) and lora_up as (out, rank), both float32."""
        return self.lora_down.flatten(1).float(), self.lora_up.flatten(1).float()


@dataclass(frozen=True, eq=False)
class Adapter:
    """A whole LoRA. Layers of other kinds are named in `other`, and `extra` keeps their tensors.

    `left_out` names what changes nothing in ComfyUI. `extra` keeps of it what other programs may use.
    """

    layers: dict[str, Layer]  # by base name as ComfyUI knows it, "diffusion_model.…" or "lora_unet_…"
    metadata: dict[str, str] = field(default_factory=dict)
    other: dict[str, str] = field(default_factory=dict)  # base name -> kind; a bias difference can stand beside a LoRA
    extra: dict[str, Tensor] = field(default_factory=dict)  # the tensors of `other`, by their full keys
    left_out: dict[str, str] = field(default_factory=dict)  # base name or key -> why it changes nothing
    remarks: tuple[str, ...] = ()  # sentences for the user on how the file was read


def with_dtype(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    """Return a copy whose factors have another floating-point type; alpha stays exact.

    Raises:
        ValueError: a finite value is too large for the type, as 1e5 is for float16.
    """
    layers = {}
    for base, layer in adapter.layers.items():
        layers[base] = replace(layer, lora_down=layer.lora_down.to(dtype), lora_up=layer.lora_up.to(dtype))
        if not (is_finite(layers[base].lora_down) and is_finite(layers[base].lora_up)):
            raise ValueError(f"Layer '{base}' does not fit into {dtype}: save it in a type with a larger range (fp32).")
    # Of the other tensors, alphas stay exact, and shapes and sizes stay integers.
    extra = {
        key: tensor.to(dtype) if tensor.is_floating_point() and tensor.numel() > 1 else tensor
        for key, tensor in adapter.extra.items()
    }
    return replace(adapter, layers=layers, extra=extra)


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinity."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    # The extremes reveal NaN and infinity ten times as fast as isfinite; the 8-bit types support neither.
    low, high = torch.aminmax(tensor.detach().float() if tensor.element_size() == 1 else tensor.detach())
    return math.isfinite(low.item()) and math.isfinite(high.item())
