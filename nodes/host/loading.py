"""A MODEL on its device for a training: whole where it fits, else with its blocks streamed from main memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch
from comfy.model_management import VRAMState

from ...aclora_core.acceleration import Region, WeightStream, gather_weights
from .replaced import replaced_attribute

# Of the free memory weights may take so much, so that a step fits beside them. A model that is streamed has as many of
# its blocks on the device as fit beside a step in any case.
_SHARE_OF_WEIGHTS = 0.5
_SAVING = VRAMState.LOW_VRAM, VRAMState.NO_VRAM  # --lowvram and --novram


@dataclass(frozen=True)
class MemoryLimits:
    """GPU memory that a training leaves alone, in bytes."""

    most: int = 0  # that ComfyUI's process may use in all; 0 for what is there
    reserved: int = 0  # for others while it trains, such as the VAE of previews
    stream: bool = False  # whether weights are streamed that would fit, as no step fits beside them

    def free(self, device: torch.device) -> int:
        """Return how many more bytes of a GPU the training may use."""
        free = int(comfy.model_management.get_free_memory(device))
        if self.most:
            free = min(free, self.most - torch.cuda.memory_allocated(device))
        return max(0, free - self.reserved)


UNLIMITED = MemoryLimits()


@contextmanager
def loaded_weights(
    patcher: Any, others: Sequence[Any] = (), limits: MemoryLimits = UNLIMITED
) -> Iterator[list[Region] | None]:
    """Apply a MODEL's patches and load it on its device if it fits; restored on exit.

    Args:
        patcher: the MODEL's, not dynamic.
        others: patchers of other models that are needed beside it.
        limits: to the memory that the training may use.

    Yields:
        None; if the model does not fit, it is in main memory, and the regions of its blocks' weights are yielded.
    """
    # Loaded in inference mode, like the weights themselves: moved outside of it, they could be used in neither mode.
    if fits(patcher, limits):
        _load_whole([patcher, *others])
        yield None
        return
    _load_whole(others)
    cpu = torch.device("cpu")
    try:
        patcher.patch_model(cpu)
        yield gather_weights(patcher.model.diffusion_model)
    finally:
        patcher.unpatch_model(cpu)


def _load_whole(patchers: Sequence[Any]) -> None:
    """Load models with all of their weights, also where ComfyUI was started with --novram.

    It would then move each weight to the GPU and away again as it is used, which a backward pass does not survive.
    """
    with replaced_attribute(comfy.model_management, "vram_state", _unless_saving):
        comfy.model_management.load_models_gpu(patchers, force_full_load=True)


def _unless_saving(state: VRAMState) -> VRAMState:
    return VRAMState.NORMAL_VRAM if state in _SAVING else state


def fits(patcher: Any, limits: MemoryLimits = UNLIMITED) -> bool:
    """Return whether a model's weights stay on its device as a whole; otherwise all models are unloaded.

    They do if they fit with room for a step. With --lowvram and --novram none do: these ask for weights that are not
    kept on the GPU.
    """
    device, size = patcher.load_device, patcher.model_size()
    if device.type != "cuda" or patcher.offload_device == device:
        return True
    saving = limits.stream or comfy.model_management.vram_state in _SAVING
    if not saving and size <= _SHARE_OF_WEIGHTS * (limits.free(device) + patcher.loaded_size()):
        return True
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    return bool(not saving and size <= _SHARE_OF_WEIGHTS * limits.free(device))


@contextmanager
def streamed_weights(patcher: Any, regions: list[Region] | None) -> Iterator[WeightStream | None]:
    """Stream a MODEL's blocks to its device while this lasts; None where there are no regions."""
    if regions is None:
        yield None
        return
    stream = WeightStream(patcher.model, patcher.model.diffusion_model, regions, patcher.load_device)
    with stream.loaded():
        yield stream
