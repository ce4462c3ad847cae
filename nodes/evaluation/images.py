"""The sets of images that the node gets: batches of any size, lists, alpha channels, and a dataset's latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import host
from ..texts import check_text

if TYPE_CHECKING:
    from comfy.sd import VAE


def read_images(name: str, given: Sequence[Any], vae: VAE | None) -> list[Tensor]:
    """Return single images (height, width, 3), float32 in 0 to 1, on the CPU.

    Args:
        name: of the input, for error messages.
        given: a list of IMAGEs, or of LATENTs as Load AC-LoRA Dataset gives them.
        vae: decodes LATENTs.

    Raises:
        ValueError: there is no image, an image is not finite or has another shape, or there is no VAE for a latent.
    """
    images = _decoded(name, given, vae) if given and isinstance(given[0], dict) else _split(name, given)
    if not images:
        raise ValueError(f"{name} holds no image. Connect images, one at least.")
    return [_checked(f"{name}: image {number}", image) for number, image in enumerate(images, start=1)]


def _split(name: str, batches: Sequence[Any]) -> list[Tensor]:
    images: list[Tensor] = []
    for batch in batches:
        if not isinstance(batch, Tensor) or batch.ndim != 4:
            shape = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
            raise ValueError(f"{name} must be IMAGEs of the shape (images, height, width, channels): {shape}.")
        images += list(batch)
    return images


def _decoded(name: str, latents: Sequence[Any], vae: VAE | None) -> list[Tensor]:
    """Decode each image of a dataset once: neither repeats, variants, nor regularisation images."""
    if vae is None:
        raise ValueError(f"{name} holds the latents of a dataset. Connect the model's VAE to vae, which decodes them.")
    chosen: dict[int, Tensor] = {}  # by identity, which the repeats of an image share
    for latent in latents:
        facts = latent.get(host.VARIANT_KEY, {})
        if facts.get("variant", 0) == 0 and "regularisation" not in facts:
            chosen.setdefault(id(latent["samples"]), latent["samples"])
    images = []
    for samples in chosen.values():
        host.raise_if_cancelled()
        images += host.decode_latent(vae, samples)
    return images


def _checked(place: str, image: Tensor) -> Tensor:
    if image.shape[-1] not in (1, 3, 4) or not image.numel():
        raise ValueError(f"{place} has the shape {tuple(image.shape)}; it must be (height, width, 1, 3 or 4 channels).")
    pixels = image.float().cpu()
    if not pixels.isfinite().all():
        raise ValueError(f"{place} holds NaN or infinity. Load the VAE in fp32 (--fp32-vae) and draw it again.")
    pixels = pixels.clamp(0, 1)
    if pixels.shape[-1] == 4:
        colour, alpha = pixels[..., :3], pixels[..., 3:]
        return colour * alpha + (1 - alpha)  # on white, as Load AC-LoRA Dataset reads images
    return pixels.expand(*pixels.shape[:2], 3) if pixels.shape[-1] == 1 else pixels


def read_prompts(given: Sequence[str], images: int) -> list[str]:
    """Return a prompt for each drawn image; an empty list if none is given.

    Args:
        given: the prompts as a list, or one text with a prompt in each line.
        images: number of drawn images.

    Raises:
        ValueError: there are more or fewer prompts than images, and not only one; or one cannot be encoded.
    """
    for text in given:
        check_text("prompts", text)
    lines = [line.strip() for text in given for line in text.splitlines() if line.strip()]
    if len(lines) == 1:
        return lines * images
    if lines and len(lines) != images:
        raise ValueError(
            f"prompts holds {len(lines)} prompts, but there are {images} drawn images. Give a line for each image, in "
            "the same order, or one prompt for all."
        )
    return lines
