"""A MODEL on its device for a training: whole where it fits, else with its blocks streamed from main memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch

from ...aclora_core.acceleration import Region, WeightStream, gather_weights

log = logging.getLogger("aclora")

# Of the free memory weights may take so much, so that a step fits beside them. A model that is streamed has as many of
# its blocks on the device as fit beside a step in any case.
_SHARE_OF_WEIGHTS = 0.5


@contextmanager
def loaded_weights(patcher: Any, others: Sequence[Any] = ()) -> Iterator[list[Region] | None]:
    """Apply a MODEL's patches and load it on its device if it fits; restored on exit.

    Args:
        patcher: the MODEL's, not dynamic.
        others: patchers of other models that are needed beside it.

    Yields:
        None; if the model does not fit, it is in main memory, and the regions of its blocks' weights are yielded.
    """
    # Loaded in inference mode, like the weights themselves: moved outside of it, they could be used in neither mode.
    if fits(patcher):
        comfy.model_management.load_models_gpu([patcher, *others], force_full_load=True)
        yield None
        return
    comfy.model_management.load_models_gpu(others, force_full_load=True)
    cpu = torch.device("cpu")
    try:
        patcher.patch_model(cpu)
        yield gather_weights(patcher.model.diffusion_model)
    finally:
        patcher.unpatch_model(cpu)


def fits(patcher: Any) -> bool:
    """Return whether a model's weights fit on its device with room for a step; otherwise all models are unloaded."""
    device, size = patcher.load_device, patcher.model_size()
    if device.type != "cuda" or patcher.offload_device == device:
        return True
    if size <= _SHARE_OF_WEIGHTS * (comfy.model_management.get_free_memory(device) + patcher.loaded_size()):
        return True
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    return bool(size <= _SHARE_OF_WEIGHTS * comfy.model_management.get_free_memory(device))


@contextmanager
def streamed_weights(patcher: Any, regions: list[Region] | None) -> Iterator[WeightStream | None]:
    """Stream a MODEL's blocks to its device while this lasts; None where there are no regions."""
    if regions is None:
        yield None
        return
    stream = WeightStream(patcher.model, patcher.model.diffusion_model, regions, patcher.load_device)
    with stream.loaded():
        if not stream.all_pinned:
            log.info("AC-LoRA: main memory could not be pinned, so the weights that are streamed come more slowly.")
        yield stream
