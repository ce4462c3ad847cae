"""Preview images, sampled with ComfyUI's sampler on the weights that are being trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import torch
from torch import Tensor

from ...aclora_core.storage import map_tensors
from .loading import MemoryLimits
from .model import HostModel
from .progress import cancelled, keep_interrupt, raise_if_cancelled
from .text_encoder import with_caption
from .training_set import HostTrainingSet

STEPS = 12
_MAX_LATENT_PIXELS = 96 * 96  # larger latents are sampled at this size
_TILE = 32  # latent pixels of a side, where a whole image does not fit into the memory beside the model
_VAE_MEMORY_FACTOR = 1.3  # of ComfyUI's estimate for a VAE, to be safe


def encode_prompts(clip: Any, prompts: Sequence[str]) -> list[Any]:
    """Return ComfyUI's conditionings of the prompts, each with its prompt recorded, and last of the empty prompt."""
    return [with_caption(clip.encode_from_tokens_scheduled(clip.tokenize(prompt)), prompt) for prompt in (*prompts, "")]


def sample_previews(
    model: HostModel,
    images: HostTrainingSet,
    vae: Any,
    conditionings: Sequence[Any],
    seed: int,
    guidance: float,
    numbers: Sequence[int] | None = None,
) -> list[Tensor]:
    """Sample an image for each conditioning but the last, which is the negative one of all.

    The model is neither loaded nor moved. If no VAE is given, or it does not fit into memory beside the model, the
    images are made from the latents directly, small and blurred. A cancel ends the sampling and stays set.

    Args:
        model: with the adapter as it is.
        images: of the training, whose most common size the previews have.
        vae: ComfyUI's VAE, or None.
        conditionings: ComfyUI's, as from encode_prompts.
        seed: of the first image's noise; each further image has the next one.
        guidance: the sampler's cfg.
        numbers: of the conditionings to sample, from 0; None for all.

    Returns:
        Images (height, width, 3) in 0 to 1, on the CPU; fewer than prompts after a cancel.
    """
    *positives, negative = conditionings
    previews = []
    for number in range(len(positives)) if numbers is None else numbers:
        generator = torch.Generator().manual_seed(seed + number)
        noise = torch.randn(_preview_shape(images.commonest_shape), generator=generator)
        with keep_interrupt():
            latent = _sample(model, noise, positives[number], negative, seed, guidance)
            previews.append(_decode(model, vae, latent))
        if cancelled():
            break
    return previews


def _preview_shape(commonest: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a preview's latent: the most common one, scaled down if it is large."""
    *others, height, width = commonest
    factor = (_MAX_LATENT_PIXELS / (height * width)) ** 0.5
    if factor >= 1:
        return commonest
    return (*others, *(max(4, round(side * factor / 4) * 4) for side in (height, width)))


def _sample(model: HostModel, noise: Tensor, positive: Any, negative: Any, seed: int, guidance: float) -> Tensor:
    patcher, base = model.patcher, model.base
    guider = comfy.samplers.CFGGuider(patcher)
    guider.set_conds(map_tensors(positive, Tensor.clone), map_tensors(negative, Tensor.clone))  # no inference tensors
    guider.set_cfg(1.0 if _has_guidance_embedding(model.network) else guidance)
    guider.model_options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
    kind = comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING
    comfy.patcher_extension.add_wrapper_with_key(kind, "aclora", _already_loaded, guider.model_options, True)
    is_flow = model.objective.shift_of is not None
    scheduler = "normal" if model.objective.sampling == "uniform" and not is_flow else "simple"
    sigmas = comfy.samplers.calculate_sigmas(base.model_sampling, scheduler, STEPS)
    sampler = comfy.samplers.sampler_object("euler")
    empty = torch.zeros_like(noise)

    def on_step(*_: Any) -> None:
        raise_if_cancelled()

    return guider.sample(noise, empty, sampler, sigmas, callback=on_step, disable_pbar=True, seed=seed)


def _already_loaded(
    executor: Any, model: Any, noise_shape: Any, conds: Any, **options: Any
) -> tuple[Any, Any, list[Any]]:
    """Replace ComfyUI's loading of the model, which would move weights whose addresses the training relies on."""
    return model.model, conds, []


def _has_guidance_embedding(network: torch.nn.Module) -> bool:
    """Whether guidance is an input of the network, as in Flux, where classifier-free guidance would be wrong."""
    return bool(getattr(getattr(network, "params", None), "guidance_embed", False))


def memory_limits(gigabytes: float, vae: Any = None) -> MemoryLimits:
    """Return the limits of a training.

    Args:
        gigabytes: of GPU memory that ComfyUI may use in all, of 1024³ bytes like those of --reserve-vram; 0 for all.
        vae: of previews; room for it is reserved where it runs on the GPU.
    """
    on_gpu = vae is not None and vae.device.type == "cuda"
    return MemoryLimits(int(gigabytes * 1024**3), preview_memory(vae) if on_gpu else 0)


def preview_memory(vae: Any) -> int:
    """Return the bytes of GPU memory that decoding previews needs at least: a VAE's weights and one tile."""
    tile = (1, vae.latent_channels, *[1] * (vae.latent_dim - 2), _TILE, _TILE)
    return int(_VAE_MEMORY_FACTOR * (vae.model_size() + vae.memory_used_decode(tile, vae.vae_dtype)))


def _decode(model: HostModel, vae: Any, samples: Tensor) -> Tensor:
    if vae is None:
        return _from_latent(model.base, samples)
    with torch.inference_mode():  # the mode in which ComfyUI created the VAE's weights
        if _fits(model, vae, samples):
            pixels = vae.decode(samples.clone())
        elif vae.latent_dim in (2, 3) and _free(model) > preview_memory(vae):
            pixels = vae.decode_tiled(samples.clone(), tile_x=_TILE, tile_y=_TILE, overlap=_TILE // 4)
        else:
            return _from_latent(model.base, samples)
    return pixels.reshape(-1, *pixels.shape[-3:])[0].float().cpu().clamp(0, 1).clone()


def _fits(model: HostModel, vae: Any, samples: Tensor) -> bool:
    """Whether ComfyUI can load and use the VAE without freeing memory, for which it would move the model."""
    if model.device.type == "cpu" or vae.device != model.device:
        return True
    wanted = vae.model_size() + vae.memory_used_decode(samples.shape, vae.vae_dtype)
    wanted += comfy.model_management.minimum_inference_memory()
    return _free(model) > _VAE_MEMORY_FACTOR * wanted


def _free(model: HostModel) -> int:
    return int(comfy.model_management.get_free_memory(model.device))


def _from_latent(base: Any, samples: Tensor) -> Tensor:
    """Return a latent as an image with one colour per latent pixel, as ComfyUI's quick preview shows it."""
    form = base.latent_format
    if form.latent_rgb_factors is None:
        raise RuntimeError("there is no VAE, or no memory for it, and ComfyUI has no quick preview for this model")
    latent = base.process_latent_in(samples).float().cpu()
    if form.latent_rgb_factors_reshape is not None:
        latent = form.latent_rgb_factors_reshape(latent)
    latent = latent[0, :, 0] if latent.ndim == 5 else latent[0]
    colours = torch.tensor(form.latent_rgb_factors, dtype=torch.float32)
    bias = form.latent_rgb_factors_bias
    pixels = latent.movedim(0, -1) @ colours + (torch.tensor(bias) if bias is not None else 0.0)
    return ((pixels + 1) / 2).clamp(0, 1)
