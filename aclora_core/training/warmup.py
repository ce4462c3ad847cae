"""What happens before the first step: a trial step, kernels compiled together, the network's shared inputs found."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

from ..acceleration import InplaceAddLog, compile_in_parallel, find_kernels, out_of_memory_named, paced
from ..config import TrainConfig
from ..diffusion import Batch
from ..text import error_reason
from .activity import OnActivity, ignore
from .adapted_model import AdaptedModel

# Networks for which kernels were compiled since the program started; whatever else is needed is compiled when it runs.
_compiled_for: set[Hashable] = set()


def warm_up(
    adapted: AdaptedModel,
    batch: Batch,
    config: TrainConfig,
    join_shared_inputs: Callable[[], None],
    begins: OnActivity = ignore,
) -> None:
    """Run a forward and a backward pass with one image, so that a model that cannot be trained fails before the work.

    The pass runs with as little memory as possible. Kernels that it needs are compiled in parallel first. The caller
    clears the gradients.

    Args:
        adapted: the model, with its adapter injected.
        batch: one image, on the device.
        config: the settings.
        join_shared_inputs: called after each pass, when layers that read the same tensor are known.
        begins: called before kernels are compiled, and before the pass.
    """
    model, checkpointing = adapted.model, adapted.checkpointing
    on_gpu = model.device.type != "cpu"
    if config.checkpointing == "all" or (config.checkpointing == "automatic" and on_gpu):
        checkpointing.recompute_all()
    kernels = find_kernels(model.device, model.dtype, "lora")
    network_kind = type(model.network), model.dtype, model.device, config.max_rank, config.layers
    with paced(adapted.graphs.in_pace):
        if kernels is not None and network_kind not in _compiled_for:
            begins("kernels")
            with compile_in_parallel(model.device, kernels):
                for _ in range(2):  # first the layers alone, then those that share an input together
                    trial_step(adapted, batch)
                    join_shared_inputs()
            _compiled_for.add(network_kind)
        begins("trial step")
        trial_step(adapted, batch)
        join_shared_inputs()
    if config.checkpointing == "automatic":
        checkpointing.recomputed.clear()


def trial_step(adapted: AdaptedModel, batch: Batch) -> None:
    """Run a forward and a backward pass; where that fails, once more without in-place additions.

    Most likely the network overwrites what its backward pass needs, which shows in many ways.

    Raises:
        RuntimeError: the model cannot compute with the image or its caption, or gives no gradients.
    """
    try:
        if not _gives_gradients(adapted, batch):
            adapted.checkpointing.no_inplace_add = True
            with out_of_memory_named():
                adapted.loss(batch)[0].backward()
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a network does with inputs that it was not made for
        raise RuntimeError(f"The model cannot be trained on these images: {_why(error)}") from error


def _why(error: Exception) -> str:
    reason = error_reason(error)
    if isinstance(error, MemoryError) or "can't allocate memory" in reason:
        return (
            f"there is too little main memory ({reason}). Close other programs, use smaller images, or choose "
            "'attention' for layers."
        )
    return (
        f"{reason}. If latents or captions come from another model, connect the VAE and the CLIP that belong to this "
        "one to the dataset node."
    )


def _gives_gradients(adapted: AdaptedModel, batch: Batch) -> bool:
    """Return whether a backward pass works. Its error is dropped, as it would keep the hooks of checkpoints alive."""
    inplace_adds = InplaceAddLog()
    try:
        with inplace_adds, out_of_memory_named():
            adapted.loss(batch)[0].backward()
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:
        inplace_adds.detach_all()
        return False
    return True
