"""Models that ComfyUI's dynamic loader streams, with plain weights.

Streamed weights are loaded and dropped while the network runs, so LoRA branches cannot be trained beside them.
"""

from __future__ import annotations

import copy
from typing import Any

import comfy.model_management
import comfy.model_patcher
from torch import nn

from .packed_weights import is_plain


def without_streaming(patcher: Any) -> Any:
    """Return a clone of a dynamic patcher, with plain weights in the dtypes that its network is made for.

    Raises:
        ValueError: the patcher comes from a loader that leaves no way to load it again, and ComfyUI cannot build
            another network of its kind.
    """
    clone = patcher.clone(disable_dynamic=True) if patcher.cached_patcher_init else _plain_copy(patcher)
    if _convert_to_declared(clone.model):
        clone.size = 0  # ComfyUI measures it again
    return clone


def _convert_to_declared(network: nn.Module) -> bool:
    """Convert weights to the dtypes that their network is made for, and return whether any was of another.

    With its dynamic loader, ComfyUI keeps the weights of linear layers as they are in the file, and converts them when
    it copies them to the GPU. Plain weights would be converted in every step, and float32 takes twice the memory.
    """
    converted = False
    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            declared = getattr(module, f"{name}_comfy_model_dtype", None)
            if declared in (None, weight.dtype) or not is_plain(weight):
                continue
            if weight.is_floating_point() and declared.is_floating_point:
                weight.data = weight.data.to(declared)
                converted = True
    return converted


def _plain_copy(model: Any) -> Any:
    """Return a MODEL with its patches on a new network, which shares the weights' memory.

    ComfyUI's own loaders register a function that loads the model again with plain weights; those of other packs often
    do not.

    Raises:
        ValueError: ComfyUI cannot build another network of this kind.
    """
    # Unloading first undoes patches and moves, so that the weights are those of the file.
    comfy.model_management.unload_model_and_clones(model, unload_additional_models=False)
    base = model.model
    try:
        fresh = base.model_config.get_model({}, "")
        fresh.diffusion_model.load_state_dict(base.diffusion_model.state_dict(), assign=True)
    except Exception as error:  # depends on what this kind of network needs
        raise ValueError(
            f"This model ({type(base).__name__}) comes from a loader that leaves no way to load it a second time, and "
            f"it could not be copied: {error}. Load it with one of ComfyUI's own nodes, such as Load Checkpoint or "
            "Load Diffusion Model, or start ComfyUI with --disable-dynamic-vram."
        ) from error
    # Facts from the file's metadata, such as v-prediction, are known from the first network only.
    fresh.model_type, fresh.model_sampling = base.model_type, copy.deepcopy(base.model_sampling)
    owner = comfy.model_patcher.ModelPatcher(fresh, model.load_device, model.offload_device)
    return model.clone(disable_dynamic=True, model_override=owner.get_clone_model_override())
