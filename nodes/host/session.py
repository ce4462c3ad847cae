"""Opens a MODEL for training, and closes it so that nothing of the training is left in it."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.sd
import torch
from torch import Tensor

from .conditioning import masks_of, prepared, regularisation_of, variants_of
from .differentiable_ops import kernels_for_training, replaced
from .families import check_family, note_on, options_for_training
from .model import TrainableModel
from .objective import objective_of
from .reload import plain_copy
from .text_encoder import TextEncoder, check_kind

log = logging.getLogger("aclora")


def with_adapter(model: Any, clip: Any, state_dict: dict[str, Tensor]) -> tuple[Any, Any]:
    """Copies of the MODEL and of the CLIP, if any, with a LoRA on them at strength 1; both stay as they are."""
    return comfy.sd.load_lora_for_models(model, clip, state_dict, 1.0, 1.0)


@contextmanager
def training(
    model: Any, latents: Sequence[dict], conditioning: Sequence[Any], clip: Any = None
) -> Iterator[TrainableModel]:
    """Opens a MODEL for training, with each latent's own caption; afterwards everything is as it was.

    clip: a CLIP that learns too.

    Raises:
        ValueError: what came in cannot be trained on; the sentence says which picture and what to do.
    """
    _check_inputs(model, latents, conditioning)
    if note := note_on(model):
        log.info("AC-LoRA: %s", note)
    patcher = _patcher_for_training(model)
    text = _text_encoder(clip, conditioning) if clip else None
    patchers = [patcher, text.patcher] if text else [patcher]
    # Still in the mode in which the host made the weights: moved in the other one, they could be used in neither.
    comfy.model_management.load_models_gpu(patchers, force_full_load=True)
    base, device = patcher.model, patcher.load_device
    with ExitStack() as stack:
        # A training's parts refer to one another, and drawing its charts leaves its frames behind. Until Python looks
        # for such rings by itself, which may take long, they would hold its memory while the next nodes draw, and a
        # patcher on which the host may stumble: its list of loaded models is not meant to lose one at any moment.
        stack.callback(gc.collect)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_kept_loaded(patchers))
        for each in patchers:
            stack.enter_context(_differentiable_weights(each.model))
        stack.enter_context(kernels_for_training())
        # In every layer the host looks for a cancel, and raises it wherever that is: in a text encoder, in a block that
        # is computed anew on the way back, in the middle of a recording. Training asks by itself, after every step.
        stack.enter_context(replaced(comfy.ops, "run_every_op", lambda own: lambda: None))
        if text:
            stack.enter_context(text.differentiable())
        scaled, conditions, groups, lengths = prepared(base, latents, conditioning, device)
        options = options_for_training(base, patcher.model_options.get("transformer_options", {}))
        objective = objective_of(base.model_sampling, base.latent_format.spacial_downscale_ratio)
        marks = {"masks": masks_of(latents, scaled), "regularisation": regularisation_of(latents)}
        yield TrainableModel(
            patcher,
            device,
            scaled,
            conditions,
            groups,
            objective,
            options,
            variants_of(latents),
            lengths=lengths,
            text=text,
            **marks,
        )


def _check_inputs(model: Any, latents: Sequence[dict], conditioning: Sequence[Any]) -> None:
    if not hasattr(getattr(model, "model", None), "diffusion_model"):
        raise ValueError("The model input is no diffusion model that can be trained. Connect a checkpoint's MODEL.")
    check_family(model.model)
    if len(latents) != len(conditioning):
        raise ValueError(
            f"There are {len(latents)} latents but {len(conditioning)} conditionings; each picture needs its own "
            "caption. Connect both outputs of one Load AC-LoRA Dataset node."
        )
    if not latents:
        raise ValueError("There are no pictures to learn from. Connect a Load AC-LoRA Dataset node.")
    channels = model.model.latent_format.latent_channels
    sides = max(2, model.model.latent_format.latent_dimensions)  # 3 for video models
    for number, latent in enumerate(latents, start=1):
        samples = latent["samples"]
        if samples.ndim != 2 + sides or samples.shape[1] != channels:
            raise ValueError(
                f"Latent {number} has the shape {tuple(samples.shape)}, but this model works on {channels} channels. "
                "Connect the VAE that belongs to the model to the dataset node."
            )
        if samples.shape[0] != 1:
            raise ValueError(
                f"Latent {number} holds {samples.shape[0]} pictures, which would share one caption. Give each picture "
                "a latent of its own, as Load AC-LoRA Dataset does."
            )
        if not torch.isfinite(samples).all():
            raise ValueError(f"Latent {number} holds NaN or infinity. Load the VAE in fp32 (--fp32-vae) and try again.")
        if len(conditioning[number - 1]) != 1:
            raise ValueError(
                f"Caption {number} is made of {len(conditioning[number - 1])} conditionings. Give each picture one, "
                "not a combination."
            )


def _text_encoder(clip: Any, conditioning: Sequence[Any]) -> TextEncoder:
    check_kind(clip)
    if clip.patcher.is_dynamic() and not clip.patcher.cached_patcher_init:
        raise ValueError(
            "This CLIP comes from a loader that leaves no way to load it a second time, so it cannot learn. Load it "
            "with one of ComfyUI's own nodes, such as Load Checkpoint or Load CLIP, or start ComfyUI with "
            "--disable-dynamic-vram."
        )
    return TextEncoder(clip, clip.patcher.clone(disable_dynamic=True), conditioning)


def _patcher_for_training(model: Any) -> Any:
    """A clone whose weights stay in place while training, and that computes in a type that holds its gradients."""
    if model.is_dynamic():
        patcher = model.clone(disable_dynamic=True) if model.cached_patcher_init else plain_copy(model)
    else:
        patcher = model.clone()
    base = patcher.model
    if base.get_dtype_inference() == torch.float16 and not _is_at_home_in_float16(base):
        if comfy.model_management.should_use_bf16(patcher.load_device):
            patcher.set_model_compute_dtype(torch.bfloat16)
    return patcher


def _is_at_home_in_float16(base: Any) -> bool:
    """Whether float16 is the type that the host would choose for such a network, as for the UNets of SD1.5 and SDXL.

    Others leave its range more easily, and are better off casting every weight to bfloat16 as it is used.
    """
    return bool(base.model_config.supported_inference_dtypes[0] == torch.float16)


@contextmanager
def _kept_loaded(patchers: Sequence[Any]) -> Iterator[None]:
    """Has the host leave these loaded, whoever asks: half a step would be computed with other weights, or elsewhere.

    The queue waits with unloading until a training has ended, but other packs may ask from a thread of their own.
    """
    loaded = comfy.model_management.current_loaded_models
    entries = [entry for entry in loaded if any(entry.model is patcher for patcher in patchers)]
    for entry in entries:
        entry.model_unload = _stays
    try:
        yield
    finally:
        for entry in entries:
            del entry.model_unload


def _stays(*_: Any, **__: Any) -> bool:
    """In place of the host's LoadedModel.model_unload, which says whether it has unloaded."""
    return False


@contextmanager
def _differentiable_weights(module: torch.nn.Module) -> Iterator[None]:
    """Weights made under inference mode cannot be used in autograd; for a while, aliases of the same memory can."""
    swapped = []
    try:
        for part in module.modules():
            for store in (part._parameters, part._buffers):
                for name, tensor in store.items():
                    if tensor is not None and (tensor.is_inference() or tensor.requires_grad):
                        swapped.append((store, name, tensor))
                        store[name] = _alias(tensor)
        yield
    finally:
        for store, name, tensor in swapped:
            store[name] = tensor
        _forget_graphs(module)


def _forget_graphs(module: torch.nn.Module) -> None:
    """Some networks keep a tensor of their last run, and with it all that it was computed from."""
    for part in module.modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                setattr(part, name, value.detach())


def _alias(tensor: Tensor) -> Tensor:
    """The same memory as a tensor that autograd accepts as a constant."""
    if hasattr(tensor, "__tensor_flatten__"):  # a quantised weight: a tensor made of others, with no memory of its own
        names, facts = tensor.__tensor_flatten__()
        inner = {name: _alias(getattr(tensor, name)) for name in names}
        alias = type(tensor).__tensor_unflatten__(inner, facts, tensor.size(), tensor.stride())
    else:
        alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    return torch.nn.Parameter(alias, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else alias
