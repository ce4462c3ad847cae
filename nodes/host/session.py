"""A MODEL opened for training, and restored completely afterwards."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.model_management
import comfy.ops
import torch

from .conditioning import latent_masks, prepare_inputs, regularisation_weights, variant_indices
from .differentiable import dequantised_layers, differentiable_weights
from .differentiable_ops import differentiable_operations
from .families import training_note, training_options
from .input_checks import check_inputs, check_unconditional
from .loading import UNLIMITED, MemoryLimits, loaded_weights, streamed_weights
from .model import HostModel
from .objective import make_objective
from .reload import without_streaming
from .replaced import replaced_attribute
from .text_encoder import TextEncoder, check_text_encoder
from .tokens import Caption
from .training_set import HostTrainingSet

log = logging.getLogger("aclora")


@contextmanager
def training_session(
    model: Any,
    latents: Sequence[dict[str, Any]],
    conditioning: Sequence[Any],
    clip: Any = None,
    unconditional: Any = None,
    prompts: Sequence[Any] = (),
    limits: MemoryLimits = UNLIMITED,
) -> Iterator[tuple[HostModel, HostTrainingSet]]:
    """Open a MODEL for training with its images, and restore everything on exit.

    Args:
        model: the MODEL.
        latents: LATENTs of one image each.
        conditioning: the encoded caption of each image.
        clip: a CLIP to train too.
        unconditional: the encoded empty caption, for caption dropout and prior preservation only. A CLIP that is
            trained encodes it anew.
        prompts: encoded captions that are not learned from; the finished adapter draws them.
        limits: to the GPU memory that the training may use.

    Yields:
        The model and the images, as train() takes them.

    Raises:
        ValueError: an input cannot be trained on; the message says which image and what to do.
    """
    check_inputs(model, latents, conditioning)
    check_unconditional(unconditional)
    if note := training_note(model):
        log.info("AC-LoRA: %s", note)
    patcher = _patcher_for_training(model)
    text = _text_encoder(clip, conditioning) if clip else None
    patchers = [patcher, text.patcher] if text else [patcher]
    variants, without_caption = variant_indices(latents), dict[int, int]()
    if unconditional is not None:  # every image comes a second time, with the empty caption
        without_caption = {index: index + len(latents) for index in range(len(latents))}
        latents, conditioning = [*latents, *latents], [*conditioning, *[unconditional] * len(latents)]
        if text:
            text.captions += [Caption("")] * len(without_caption)
    base, device = patcher.model, patcher.load_device
    with ExitStack() as stack:
        # The objects of a training form reference cycles, and charts keep stack frames alive. Until Python collects
        # them, which may take long, they would hold GPU memory that the next nodes need. They would also hold a
        # patcher: ComfyUI's list of loaded models does not expect one to disappear at an arbitrary moment.
        stack.callback(gc.collect)
        regions = stack.enter_context(loaded_weights(patcher, patchers[1:], limits))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_kept_loaded(patchers))
        for each in patchers:
            stack.enter_context(differentiable_weights(each.model))
            stack.enter_context(dequantised_layers(each.model))
        stream = stack.enter_context(streamed_weights(patcher, regions))
        stack.enter_context(differentiable_operations())
        # ComfyUI checks for a cancel in every layer and raises there: in a text encoder, in a block recomputed in the
        # backward pass, during a CUDA graph capture. Training checks for itself, after every step.
        stack.enter_context(replaced_attribute(comfy.ops, "run_every_op", lambda own: lambda: None))
        if text:
            stack.enter_context(text.differentiable())
        scaled, conditions, batch_keys, lengths = prepare_inputs(base, latents, conditioning, device)
        options = training_options(base, patcher.model_options.get("transformer_options", {}))
        objective = make_objective(base.model_sampling, base.latent_format.spacial_downscale_ratio)
        images = HostTrainingSet(
            base,
            device,
            scaled,
            conditions,
            batch_keys,
            variants=variants,
            masks=latent_masks(latents, scaled),
            regularisation=regularisation_weights(latents),
            without_caption=without_caption,
            lengths=lengths,
            text=text,
        )
        if prompts:
            images.add_prompts(prompts)
        yield HostModel(patcher, device, objective, options, text, stream, limits), images


def _text_encoder(clip: Any, conditioning: Sequence[Any]) -> TextEncoder:
    check_text_encoder(clip)
    if clip.patcher.is_dynamic() and not clip.patcher.cached_patcher_init:
        raise ValueError(
            "This CLIP comes from a loader that leaves no way to load it a second time, so it cannot be trained. Load "
            "it with one of ComfyUI's own nodes, such as Load Checkpoint or Load CLIP, or start ComfyUI with "
            "--disable-dynamic-vram."
        )
    patcher = without_streaming(clip.patcher) if clip.patcher.is_dynamic() else clip.patcher.clone()
    return TextEncoder(clip, patcher, conditioning)


def _patcher_for_training(model: Any) -> Any:
    """Return a clone whose weights stay in place, and which computes in a type with enough range for gradients."""
    patcher = without_streaming(model) if model.is_dynamic() else model.clone()
    unsuited = _computing_dtype(patcher) == torch.float16 and not _prefers_float16(patcher.model)
    if unsuited and comfy.model_management.should_use_bf16(patcher.load_device):
        patcher.set_model_compute_dtype(torch.bfloat16)
    return patcher


def _computing_dtype(patcher: Any) -> torch.dtype:
    """Return the dtype that a MODEL computes in once it is loaded.

    Its network may have been loaded last for another clone, as by a training, whose dtype is then still in force.
    """
    dtype: torch.dtype = patcher.get_model_object("manual_cast_dtype") or patcher.model.get_dtype()
    return dtype


def _prefers_float16(base: Any) -> bool:
    """Whether float16 is ComfyUI's first choice for such a network, as for the UNets of SD1.5 and SDXL.

    Other networks overflow in float16 more easily, so for them it pays to cast every weight to bfloat16 as it is used.
    """
    return bool(base.model_config.supported_inference_dtypes[0] == torch.float16)


@contextmanager
def _kept_loaded(patchers: Sequence[Any]) -> Iterator[None]:
    """Keep these loaded, whoever asks ComfyUI to unload them: a step must not change weights or device midway.

    ComfyUI's queue waits with unloading until a training has ended, but other packs may ask from their own threads.
    """
    loaded = comfy.model_management.current_loaded_models
    entries = [entry for entry in loaded if any(entry.model is patcher for patcher in patchers)]
    for entry in entries:
        entry.model_unload = _refuse_unload
    try:
        yield
    finally:
        for entry in entries:
            del entry.model_unload


def _refuse_unload(*_: Any, **__: Any) -> bool:
    """Replace ComfyUI's LoadedModel.model_unload, which returns whether it has unloaded the model."""
    return False
