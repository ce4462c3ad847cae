"""ComfyUI's LATENTs and conditionings, prepared for its diffusion model."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ...aclora_core.acceleration import out_of_memory_named
from ...aclora_core.dataset import at_latent_size, is_black
from ...aclora_core.storage import map_tensors, to_device
from ...aclora_core.text import error_reason
from .conditioning_lengths import Lengths, common_lengths, repeat_to_common_length
from .private_keys import VARIANT_KEY


def prepare_inputs(
    base: Any, latents: Sequence[dict[str, Any]], conditioning: Sequence[Any], device: torch.device
) -> tuple[list[Tensor], list[dict[str, Any]], list[Hashable], Lengths]:
    """Prepare latents and conditionings for training.

    Args:
        base: ComfyUI's BaseModel.
        latents: LATENTs of one image each.
        conditioning: the conditioning of each image.
        device: on which models compute their inputs.

    Returns:
        The latents as the network takes them, float32 in main memory; the network's other inputs for each image, by
        name; the batch key of each image, as images with one key can share a batch; and the lengths to which captions
        are repeated.

    Raises:
        ValueError: the model cannot use a caption.
    """
    # Repeated images and shared captions have the same tensors; each is prepared once.
    scaled = _scaled_latents(base, latents)
    known: dict[tuple[int, tuple[int, ...]], dict[str, Any]] = {}
    conditions = []
    with torch.no_grad():
        for number, (samples, cond) in enumerate(zip(scaled, conditioning, strict=True), start=1):
            key = (id(cond), tuple(samples.shape))
            if key not in known:
                with _caption_named(number):
                    known[key] = model_conditions(base, cond, samples, device)
            conditions.append(known[key])
    lengths = common_lengths(known.values())
    longer = {id(condition): repeat_to_common_length(condition, lengths) for condition in known.values()}
    conditions = [longer[id(condition)] for condition in conditions]
    batch_keys = [batch_key(samples, condition) for samples, condition in zip(scaled, conditions, strict=True)]
    return scaled, conditions, batch_keys, lengths


def _scaled_latents(base: Any, latents: Sequence[dict[str, Any]]) -> list[Tensor]:
    """Return the latents as the network takes them; those with the same tensor share one here too."""
    known: dict[int, Tensor] = {}
    for samples in (latent["samples"] for latent in latents):
        if id(samples) not in known:
            known[id(samples)] = base.process_latent_in(samples.clone().float().cpu())
    return [known[id(latent["samples"])] for latent in latents]


@contextmanager
def _caption_named(number: int) -> Iterator[None]:
    """Name the caption in whatever a model raises that cannot use it. Raises ValueError in its place."""
    try:
        with out_of_memory_named():
            yield
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"The model cannot use caption {number} ({error_reason(error)}). Connect the CLIP that belongs to the "
            "model to the dataset node."
        ) from error


def model_conditions(base: Any, conditioning: Any, samples: Tensor, device: torch.device) -> dict[str, Any]:
    """Return the inputs of the model besides noise for one image, by name, in main memory.

    Args:
        base: ComfyUI's BaseModel.
        conditioning: of the image.
        samples: the image's latent, (1, channels, ...), for its shape.
        device: on which the inputs are computed.
    """
    # Tensors of earlier nodes are inference tensors, which autograd refuses; their clones are not.
    single = comfy.sampler_helpers.convert_cond(map_tensors(conditioning, torch.Tensor.clone))
    noise = torch.zeros_like(samples, device=device)
    # Inpainting models get an empty image, as when they generate all of it.
    encoded = comfy.samplers.encode_model_conds(
        base.extra_conds, single, noise, device, "positive", latent_image=noise, denoise_mask=None
    )
    inputs = {}
    for name, model_cond in encoded[0]["model_conds"].items():
        cond = model_cond.process_cond(batch_size=1, area=None)
        inputs[name] = cond._copy_with(to_device(cond.cond, torch.device("cpu")))
    return inputs


def batch_key(samples: Tensor, condition: dict[str, Any]) -> Hashable:
    """Return what images of one micro-batch have in common: the shape of the latent and of the model's inputs."""
    return tuple(samples.shape), _signature(condition)


def _signature(condition: dict[str, Any]) -> Hashable:
    """Return the names, kinds and sizes of a condition; images share a batch if all of these are equal."""

    def kind(value: Any) -> Hashable:
        if isinstance(value, Tensor):
            return tuple(value.shape)
        return tuple(kind(item) for item in value) if isinstance(value, list) else repr(value)

    return tuple((name, type(cond).__name__, kind(cond.cond)) for name, cond in sorted(condition.items()))


def latent_masks(latents: Sequence[dict[str, Any]], scaled: Sequence[Tensor]) -> dict[int, Tensor]:
    """Return the masks of the latents that have one, in the size of the network's latents.

    Args:
        latents: LATENTs of one image each.
        scaled: the latents as the network takes them.

    Returns:
        The masks in 0 to 1, by the index of the image.

    Raises:
        ValueError: a mask is all black, or holds more than one image.
    """
    masks = {}
    for index, (latent, samples) in enumerate(zip(latents, scaled, strict=True)):
        mask = latent.get("noise_mask")
        if mask is None:
            continue
        if mask.shape[:-2].numel() != 1:
            raise ValueError(
                f"The mask of latent {index + 1} holds {mask.shape[:-2].numel()} images. Give each latent one mask."
            )
        flat = mask.clone().float().cpu().reshape(mask.shape[-2:]).nan_to_num().clamp(0, 1)
        masks[index] = at_latent_size(flat, samples)
        if is_black(masks[index]):
            raise ValueError(
                f"The mask of latent {index + 1} is all black, so nothing of the image would be learned. White parts "
                "are learned: invert the mask or remove the image."
            )
    return masks


def regularisation_weights(latents: Sequence[dict[str, Any]]) -> dict[int, float]:
    """Return the weight of each regularisation image, by index."""
    weights = {}
    for index, latent in enumerate(latents):
        facts = latent.get(VARIANT_KEY, {})
        if "regularisation" in facts:
            weights[index] = float(facts["regularisation"])
    return weights


def style_image_count(latents: Sequence[Any]) -> int:
    """Return the number of images of the style among latents; variants and repeats of an image count once."""
    found = set()
    for latent in filter(lambda each: isinstance(each, dict), latents):
        facts = latent.get(VARIANT_KEY, {})
        if facts.get("variant", 0) == 0 and "regularisation" not in facts:
            found.add(id(latent.get("samples")))  # repeats are the same tensor
    return len(found)


def variant_indices(latents: Sequence[dict[str, Any]]) -> dict[int, list[int]]:
    """Return the indices of all variants of each image, by the index of its first; empty if no image has variants."""
    if not any(VARIANT_KEY in latent for latent in latents):
        return {}
    by_image: dict[Hashable, list[int]] = {}
    for index, latent in enumerate(latents):
        facts = latent.get(VARIANT_KEY)
        image: Hashable = index if facts is None else ("image", facts["picture"])
        by_image.setdefault(image, []).append(index)
    return {indices[0]: indices for indices in by_image.values()}
