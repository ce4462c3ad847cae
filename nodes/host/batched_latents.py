"""Latents of several images, as ComfyUI's Resolution Bucket gives them, become latents of one image each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def one_image_each(latents: Sequence[Any], conditioning: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Split latents that come with a conditioning for each of their images; all others stay as they are.

    Args:
        latents: LATENTs.
        conditioning: of each latent.

    Returns:
        The latents and their conditionings, of one image each where they could be split.
    """
    if len(latents) != len(conditioning):  # which the check of the inputs reports
        return list(latents), list(conditioning)
    images: list[Any] = []
    captions: list[Any] = []
    for latent, encoded in zip(latents, conditioning, strict=True):
        count = _image_count(latent)
        if count > 1 and isinstance(encoded, list | tuple) and len(encoded) == count:
            images += [_image(latent, number, count) for number in range(count)]
            captions += [[each] for each in encoded]
        else:
            images.append(latent)
            captions.append(encoded)
    return images, captions


def _image_count(latent: Any) -> int:
    samples = latent.get("samples") if isinstance(latent, dict) else None
    return samples.shape[0] if isinstance(samples, Tensor) and samples.ndim else 1


def _image(latent: dict[str, Any], number: int, count: int) -> dict[str, Any]:
    """One image of a latent, with its mask if each image has one."""
    return {
        name: value[number : number + 1] if isinstance(value, Tensor) and len(value) == count else value
        for name, value in latent.items()
    }
