"""Opens a MODEL for training, and closes it so that nothing of the training is left in it."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.model_management
import comfy.ops
import torch

from .conditioning import masks_of, prepared, regularisation_of, variants_of
from .differentiable import differentiable_weights
from .differentiable_ops import kernels_for_training, replaced
from .families import check_family, note_on, options_for_training
from .model import HostModel
from .objective import objective_of
from .reload import plain_copy
from .text_encoder import TextEncoder, check_kind
from .training_set import HostTrainingSet

log = logging.getLogger("aclora")


@contextmanager
def training_session(
    model: Any, latents: Sequence[dict[str, Any]], conditioning: Sequence[Any], clip: Any = None
) -> Iterator[tuple[HostModel, HostTrainingSet]]:
    """Open a MODEL for training, with its images; afterwards everything is as it was.

    Args:
        model: the MODEL.
        latents: LATENTs of one image each.
        conditioning: the caption of each image.
        clip: a CLIP that learns too.

    Raises:
        ValueError: an input cannot be trained on; the message says which image and what to do.
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
            stack.enter_context(differentiable_weights(each.model))
        stack.enter_context(kernels_for_training())
        # In every layer the host looks for a cancel, and raises it wherever that is: in a text encoder, in a block that
        # is computed anew on the way back, in the middle of a recording. Training asks by itself, after every step.
        stack.enter_context(replaced(comfy.ops, "run_every_op", lambda own: lambda: None))
        if text:
            stack.enter_context(text.differentiable())
        scaled, conditions, batch_keys, lengths = prepared(base, latents, conditioning, device)
        options = options_for_training(base, patcher.model_options.get("transformer_options", {}))
        objective = objective_of(base.model_sampling, base.latent_format.spacial_downscale_ratio)
        images = HostTrainingSet(
            base,
            device,
            scaled,
            conditions,
            batch_keys,
            variants=variants_of(latents),
            masks=masks_of(latents, scaled),
            regularisation=regularisation_of(latents),
            lengths=lengths,
            text=text,
        )
        yield HostModel(patcher, device, objective, options, text), images


def _check_inputs(model: Any, latents: Sequence[dict[str, Any]], conditioning: Sequence[Any]) -> None:
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
    in_float16 = base.get_dtype_inference() == torch.float16
    if in_float16 and not _is_at_home_in_float16(base) and comfy.model_management.should_use_bf16(patcher.load_device):
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
