"""A second, plain copy of a MODEL whose weights the host streams, for loaders that have not said how to load it twice.

Weights that are streamed come and go while the network computes, so they cannot be trained beside. Loaders of the
host's own leave word of how to load a plain copy; other packs' loaders often do not.
"""

from __future__ import annotations

import copy
from typing import Any

import comfy.model_management
import comfy.model_patcher


def plain_copy(model: Any) -> Any:
    """The MODEL with its patches, on a network of its own over the same weights; they are not held twice in memory.

    Raises:
        ValueError: the host cannot make another network of this kind.
    """
    # What the host has changed and moved for drawing goes back first: then the weights are those of the file.
    comfy.model_management.unload_model_and_clones(model, unload_additional_models=False)
    base = model.model
    try:
        fresh = base.model_config.get_model({}, "")
        fresh.diffusion_model.load_state_dict(base.diffusion_model.state_dict(), assign=True)
    except Exception as error:  # whatever the maker of this kind of network misses
        raise ValueError(
            f"This model ({type(base).__name__}) comes from a loader that leaves no way to load it a second time, and "
            f"none could be made: {error}. Load it with one of ComfyUI's own nodes, such as Load Checkpoint or Load "
            "Diffusion Model, or start ComfyUI with --disable-dynamic-vram."
        ) from error
    # What a file said beside its weights, such as that the model predicts v, is only known from the first network.
    fresh.model_type, fresh.model_sampling = base.model_type, copy.deepcopy(base.model_sampling)
    owner = comfy.model_patcher.ModelPatcher(fresh, model.load_device, model.offload_device)
    return model.clone(disable_dynamic=True, model_override=owner.get_clone_model_override())
