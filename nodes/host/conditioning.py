"""Latents and conditionings as the host hands them out, made ready for its model."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ...aclora_core.dataset import at_latent_size, is_black
from ...aclora_core.storage import map_tensors, to_device
from .conditioning_lengths import Lengths, common_lengths, repeated
from .private_keys import VARIANT_KEY


def prepared(
    base: Any, latents: Sequence[dict[str, Any]], conditioning: Sequence[Any], device: torch.device
) -> tuple[list[Tensor], list[dict[str, Any]], list[Hashable], Lengths]:
    """Latents as the host's network sees them, what it wants besides, by name, what can share a batch, and lengths."""
    scaled = [base.process_latent_in(latent["samples"].clone().float().cpu()) for latent in latents]
    # The same tensors come again for repeated pictures and shared captions; each is prepared once.
    known: dict[tuple[int, tuple[int, ...]], dict[str, Any]] = {}
    conditions = []
    with torch.no_grad():
        for samples, cond in zip(scaled, conditioning, strict=True):
            key = (id(cond), tuple(samples.shape))
            if key not in known:
                known[key] = condition_of(base, cond, samples, device)
            conditions.append(known[key])
    lengths = common_lengths(known.values())
    longer = {id(condition): repeated(condition, lengths) for condition in known.values()}
    conditions = [longer[id(condition)] for condition in conditions]
    groups: list[Hashable] = [(tuple(s.shape), _signature(c)) for s, c in zip(scaled, conditions, strict=True)]
    return scaled, conditions, groups, lengths


def condition_of(base: Any, conditioning: Any, samples: Tensor, device: torch.device) -> dict[str, Any]:
    """What the host's model wants for one picture, by name, kept in main memory."""
    # Tensors of earlier nodes were made under inference mode; their clones were not.
    single = comfy.sampler_helpers.convert_cond(map_tensors(conditioning, torch.Tensor.clone))
    noise = torch.zeros_like(samples, device=device)
    # Models that fill in a part of a picture get an empty one, as when they draw all of it.
    encoded = comfy.samplers.encode_model_conds(
        base.extra_conds, single, noise, device, "positive", latent_image=noise, denoise_mask=None
    )
    conds = {n: c.process_cond(batch_size=1, area=None) for n, c in encoded[0]["model_conds"].items()}
    return {name: cond._copy_with(to_device(cond.cond, torch.device("cpu"))) for name, cond in conds.items()}


def _signature(condition: dict[str, Any]) -> Hashable:
    """What two captions must share to be joined: names, kinds and sizes."""

    def kind(value: Any) -> Hashable:
        if isinstance(value, Tensor):
            return tuple(value.shape)
        return tuple(kind(item) for item in value) if isinstance(value, list) else repr(value)

    return tuple((name, type(cond).__name__, kind(cond.cond)) for name, cond in sorted(condition.items()))


def masks_of(latents: Sequence[dict[str, Any]], scaled: Sequence[Tensor]) -> dict[int, Tensor]:
    """The masks of those that have one, by number, brought down to the size of the network's latents.

    Raises:
        ValueError: a mask is all black, or holds more than one picture.
    """
    masks = {}
    for number, (latent, samples) in enumerate(zip(latents, scaled, strict=True)):
        mask = latent.get("noise_mask")
        if mask is None:
            continue
        if mask.shape[:-2].numel() != 1:
            raise ValueError(
                f"The mask of latent {number + 1} holds {mask.shape[:-2].numel()} pictures. Give each latent one mask."
            )
        flat = mask.clone().float().cpu().reshape(mask.shape[-2:]).nan_to_num().clamp(0, 1)
        masks[number] = at_latent_size(flat, samples)
        if is_black(masks[number]):
            raise ValueError(
                f"The mask of latent {number + 1} is all black, so that nothing of it would be learned. White is what "
                "is learned: invert the mask or take the picture away."
            )
    return masks


def regularisation_of(latents: Sequence[dict[str, Any]]) -> dict[int, float]:
    """What each regularisation picture counts, by number."""
    marks = {number: latent.get(VARIANT_KEY, {}) for number, latent in enumerate(latents)}
    return {number: float(mark["regularisation"]) for number, mark in marks.items() if "regularisation" in mark}


def variants_of(latents: Sequence[dict[str, Any]]) -> dict[int, list[int]]:
    """For the first variant of each picture the numbers of all its variants; empty where the dataset made none."""
    if not any(VARIANT_KEY in latent for latent in latents):
        return {}
    pictures: dict[Any, list[int]] = {}
    for number, latent in enumerate(latents):
        known = latent.get(VARIANT_KEY)
        pictures.setdefault(number if known is None else ("picture", known["picture"]), []).append(number)
    return {numbers[0]: numbers for numbers in pictures.values()}
