"""A plain copy of a MODEL whose weights ComfyUI streams, for loaders without a reload function.

Streamed weights are loaded and dropped while the network runs, so LoRA branches cannot be trained beside them.
ComfyUI's own loaders register a function that loads the model again with plain weights; those of other packs often do
not.
"""

from __future__ import annotations

import copy
from typing import Any

import comfy.model_management
import comfy.model_patcher


def plain_copy(model: Any) -> Any:
    """Return the MODEL with its patches on a new network, which shares the weights' memory.

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
