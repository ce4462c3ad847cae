"""The tiny base in ComfyUI's quantised formats, and with weights of a class of their own, as from GGUF files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


class Format(NamedTuple):
    """How ComfyUI names a format in a file, how it makes its weights, and what it says of a layer besides."""

    name: str
    layout: str
    options: dict[str, Any] = {}
    facts: dict[str, Any] = {}


_ROTATED = {"convrot_groupsize": 64}
FORMATS = {
    "fp8 e4m3": Format("float8_e4m3fn", "TensorCoreFP8E4M3Layout"),
    "fp8 e5m2": Format("float8_e5m2", "TensorCoreFP8E5M2Layout"),
    "nvfp4": Format("nvfp4", "TensorCoreNVFP4Layout"),
    "mxfp8": Format("mxfp8", "TensorCoreMXFP8Layout"),
    "int8 tensor": Format("int8_tensorwise", "TensorWiseINT8Layout"),
    "int8 row": Format("int8_tensorwise", "TensorWiseINT8Layout", {"per_channel": True}),
    "int8 convrot": Format(
        "int8_tensorwise",
        "TensorWiseINT8Layout",
        {"per_channel": True, "convrot": True, **_ROTATED},
        {"convrot": True, **_ROTATED},
    ),
    "convrot_w4a4": Format("convrot_w4a4", "TensorCoreConvRotW4A4Layout", _ROTATED, _ROTATED),
}


def tiny_denoiser(folder: Path) -> dict[str, Tensor]:
    """Return the weights of the tiny base's denoiser in float32."""
    import comfy.utils

    weights = comfy.utils.load_torch_file(str(folder / "denoiser.safetensors"))
    return {name: weight.float() for name, weight in weights.items()}


def load(weights: dict[str, Tensor], form: Format | None, disable_dynamic: bool = False) -> Any:
    """Return the MODEL of the tiny base's denoiser with its linear layers in a format; None leaves them as they are."""
    import comfy.sd

    file = weights if form is None else quantised(weights, form)
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model_state_dict(dict(file), disable_dynamic=disable_dynamic)
    model.model.model_sampling.set_parameters(shift=1.0)
    model.cached_patcher_init = (load, (weights, form))
    return model


def quantised(weights: dict[str, Tensor], form: Format) -> dict[str, Tensor]:
    """Return the weights as ComfyUI stores them, those of the blocks' linear layers in the format."""
    from comfy.quant_ops import QuantizedTensor

    said = torch.tensor(list(json.dumps({"format": form.name, **form.facts}).encode()), dtype=torch.uint8)
    file: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if is_block_weight(name, weight):
            file |= QuantizedTensor.from_float(weight, form.layout, **form.options).state_dict(name)
            file[f"{name.removesuffix('weight')}comfy_quant"] = said
        else:
            file[name] = weight
    return file


def is_block_weight(name: str, weight: Tensor) -> bool:
    """Return whether a weight is that of a linear layer in a block."""
    return name.startswith("joint_blocks.") and weight.ndim == 2


class PackedWeight(torch.Tensor):
    """A weight in bytes that knows its type and its true shape, as ComfyUI-GGUF keeps weights of GGUF files.

    It behaves as theirs: attributes beside the data, a shape that is not that of the data, and no copies.
    The type "Q8_0" is GGUF's: 32 values share a float16 scale.
    """

    tensor_type: str
    tensor_shape: torch.Size

    @classmethod
    def pack(cls, weight: Tensor) -> PackedWeight:
        """Return a weight (out, in) in 8 bits; in is a multiple of 32."""
        groups = weight.float().reshape(-1, 32)
        scale = (groups.abs().amax(1, keepdim=True) / 127).half()
        numbers = (groups / scale.float().clamp_min(1e-8)).round().clamp(-127, 127).to(torch.int8)
        data = torch.cat([scale.view(torch.uint8), numbers.view(torch.uint8)], 1).reshape(weight.shape[0], -1)
        packed = data.clone().as_subclass(cls)
        packed.tensor_type, packed.tensor_shape = "Q8_0", weight.shape
        return packed

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """Return the weight's values, (out, in)."""
        data = self.as_subclass(torch.Tensor).reshape(-1, 34)
        scale = data[:, :2].contiguous().view(torch.float16).to(dtype)
        return (data[:, 2:].contiguous().view(torch.int8).to(dtype) * scale).reshape(self.tensor_shape)

    def detach(self) -> PackedWeight:
        return self

    def clone(self, *args: Any, **kwargs: Any) -> PackedWeight:
        return self

    @property
    def shape(self) -> torch.Size:
        return self.tensor_shape


def packed_linear(linear: Any, tells: bool) -> Any:
    """Return a linear layer of ComfyUI's kind whose weight is packed.

    tells: whether it has ComfyUI-GGUF's method for the values of its weight.
    """
    import comfy.ops

    class Linear(comfy.ops.manual_cast.Linear):
        """Unpacks its weight whenever it computes."""

        def forward_comfy_cast_weights(self, input: Tensor) -> Tensor:
            bias = None if self.bias is None else self.bias.to(input)
            return nn.functional.linear(input, self.weight.unpacked(input.dtype), bias)

    class Telling(Linear):
        def get_weight(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
            assert not _get_current_dispatch_mode_stack()  # with which ComfyUI-GGUF fails
            return tensor.unpacked(dtype) if isinstance(tensor, PackedWeight) else tensor.to(dtype)

    kind = Telling if tells else Linear
    layer = kind(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    layer.weight = nn.Parameter(PackedWeight.pack(linear.weight), requires_grad=False)
    layer.bias = linear.bias
    return layer


def pack_blocks(model: Any, tells: bool = True) -> Any:
    """Replace the linear layers in the blocks of a MODEL that is in main memory by packed ones, and return it."""
    network = model.model.diffusion_model
    with torch.inference_mode():
        for name, module in list(network.named_modules()):
            if name.startswith("joint_blocks.") and isinstance(module, nn.Linear):
                parent, _, child = name.rpartition(".")
                setattr(network.get_submodule(parent), child, packed_linear(module, tells))
    return model
