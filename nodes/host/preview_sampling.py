"""Preview pictures through the host's own sampler, on the weights that are being trained."""

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
from .model import HostModel
from .progress import cancel_kept, cancelled, raise_if_cancelled
from .training_set import HostTrainingSet

STEPS = 12
_LARGEST = 96 * 96  # latent pixels; larger ones are drawn smaller
_ROOM = 1.3  # times the memory that the host expects a VAE to take


def encoded(clip: Any, prompts: Sequence[str]) -> list[Any]:
    """The conditioning of each prompt, and last that of an empty one."""
    return [clip.encode_from_tokens_scheduled(clip.tokenize(prompt)) for prompt in (*prompts, "")]


def draw(
    model: HostModel, images: HostTrainingSet, vae: Any, conditionings: Sequence[Any], seed: int, guidance: float
) -> list[Tensor]:
    """A picture (height, width, 3) for each conditioning but the last, which is the negative one of all.

    The model is neither loaded nor moved for it. Where a VAE would not fit beside it, or there is none, pictures are
    made from the latents alone, small and blurred.
    """
    *positives, negative = conditionings
    pictures = []
    for number, positive in enumerate(positives):
        generator = torch.Generator().manual_seed(seed + number)
        noise = torch.randn(_shape(images.commonest_shape), generator=generator)
        with cancel_kept():
            pictures.append(_decode(model, vae, _sample(model, noise, positive, negative, seed, guidance)))
        if cancelled():
            break
    return pictures


def _shape(commonest: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a preview's latent: the commonest one, made smaller where it is large."""
    *others, height, width = commonest
    share = min(1.0, (_LARGEST / (height * width)) ** 0.5)
    return (*others, *(max(4, round(side * share / 4) * 4) if share < 1 else side for side in (height, width)))


def _sample(model: HostModel, noise: Tensor, positive: Any, negative: Any, seed: int, guidance: float) -> Tensor:
    patcher, base = model.patcher, model.base
    guider = comfy.samplers.CFGGuider(patcher)
    guider.set_conds(map_tensors(positive, Tensor.clone), map_tensors(negative, Tensor.clone))  # not of inference mode
    guider.set_cfg(1.0 if _knows_guidance(model.network) else guidance)
    guider.model_options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
    kind = comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING
    comfy.patcher_extension.add_wrapper_with_key(kind, "aclora", _already_loaded, guider.model_options, True)
    scheduler = "normal" if model.objective.sampling == "uniform" else "simple"
    sigmas = comfy.samplers.calculate_sigmas(base.model_sampling, scheduler, STEPS)
    sampler = comfy.samplers.sampler_object("euler")
    nothing, each = torch.zeros_like(noise), lambda *_: raise_if_cancelled()
    return guider.sample(noise, nothing, sampler, sigmas, callback=each, disable_pbar=True, seed=seed)


def _already_loaded(
    executor: Any, model: Any, noise_shape: Any, conds: Any, **options: Any
) -> tuple[Any, Any, list[Any]]:
    """Takes the place of the host's loading: that would move weights whose addresses the training relies on."""
    return model.model, conds, []


def _knows_guidance(network: torch.nn.Module) -> bool:
    """Whether the guidance is an input of the model, as of Flux; then a second pass for it would be wrong."""
    return bool(getattr(getattr(network, "params", None), "guidance_embed", False))


def _decode(model: HostModel, vae: Any, samples: Tensor) -> Tensor:
    if vae is not None and _fits(model, vae, samples):
        with torch.inference_mode():  # in which the host has made the VAE's weights
            pixels = vae.decode(samples.clone())
        return pixels.reshape(-1, *pixels.shape[-3:])[0].float().cpu().clamp(0, 1).clone()
    return _from_latent(model.base, samples)


def _fits(model: HostModel, vae: Any, samples: Tensor) -> bool:
    """Whether the host can load and use the VAE without making room, for which it would move the model."""
    if model.device.type == "cpu" or vae.device != model.device:
        return True
    wanted = vae.model_size() + vae.memory_used_decode(samples.shape, vae.vae_dtype)
    wanted += comfy.model_management.minimum_inference_memory()
    return bool(comfy.model_management.get_free_memory(model.device) > _ROOM * wanted)


def _from_latent(base: Any, samples: Tensor) -> Tensor:
    """What the host's own quick preview shows: each latent pixel as a colour."""
    form = base.latent_format
    if form.latent_rgb_factors is None:
        raise RuntimeError("there is no VAE, or no memory left for it, and this model's latents have no colours")
    latent = base.process_latent_in(samples).float().cpu()
    if form.latent_rgb_factors_reshape is not None:
        latent = form.latent_rgb_factors_reshape(latent)
    latent = latent[0, :, 0] if latent.ndim == 5 else latent[0]
    colours = torch.tensor(form.latent_rgb_factors, dtype=torch.float32)
    bias = form.latent_rgb_factors_bias
    pixels = latent.movedim(0, -1) @ colours + (torch.tensor(bias) if bias is not None else 0.0)
    return ((pixels + 1) / 2).clamp(0, 1)
