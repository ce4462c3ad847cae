"""Pictures through the VAE and captions through the CLIP, unless both are known from before."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from ...aclora_core.dataset import CaptionedImage, at_latent_size, is_black, load_image, load_mask
from .. import host
from ..host.encoding_keys import KnownEncodings

if TYPE_CHECKING:
    from comfy.sd import CLIP, VAE

BATCH = 4  # pictures encoded at once
SHOWN = 12  # pictures on the contact sheet
_PALE = 0.2  # of what a mask leaves out there
Size = tuple[int, int]
View = tuple[CaptionedImage, bool, Size]  # a picture, whether it is mirrored, and the size that it is brought to
MaskSource = Literal["files", "files or alpha", "off"]


@dataclass
class Encoded:
    """What became of the pictures. Latents are in the order of the scan."""

    # For each picture its latents (1, channels, ...), by whether it is mirrored and the place of the size in `sizes`.
    latents: dict[CaptionedImage, dict[tuple[bool, int], torch.Tensor]] = field(default_factory=dict)
    masks: dict[CaptionedImage, dict[tuple[bool, int], torch.Tensor]] = field(default_factory=dict)  # (1, 1, h, w)
    sizes: dict[CaptionedImage, list[Size]] = field(default_factory=dict)  # first that of the resolution
    previews: dict[CaptionedImage, torch.Tensor] = field(default_factory=dict)  # (height, width, 3)
    problems: list[str] = field(default_factory=list)


def encode_images(
    vae: VAE,
    sizes: dict[CaptionedImage, list[Size]],
    sides: tuple[bool, ...],
    masks: MaskSource,
    known: KnownEncodings,
    advance: Callable[[int], None],
) -> Encoded:
    """Those of one size in small batches; pictures that cannot be read become problems.

    sides: for each latent that a picture gets in one size whether it is mirrored. The latent of a mirrored picture is
    not the mirrored latent, so it goes through the VAE too.
    """
    # A video VAE would take a batch for the frames of one clip.
    batch = BATCH if getattr(vae, "latent_dim", 2) == 2 else 1
    encoded = Encoded()
    wholes = _read_masks(sizes, masks, vae.spacial_compression_encode(), encoded)
    keys: dict[View, str | None] = {}
    latents: dict[View, torch.Tensor] = {}
    views = {picture: [(picture, side, size) for size in own for side in sides] for picture, own in sizes.items()}
    for view in (view for own in views.values() for view in own):
        host.raise_if_cancelled()
        keys[view] = known.picture_key(*view)
        latent = known.get(keys[view])
        if latent is not None:
            latents[view] = latent
            advance(1)
    for chunk in _chunks([view for view in keys if view not in latents], batch):
        host.raise_if_cancelled()
        for view, latent in _encoded_chunk(vae, chunk, encoded).items():
            latents[view] = latent
            # Asked again, so that a file replaced in the meantime is not stored under the key of the old one.
            if known.picture_key(*view) == keys[view]:
                known.put(keys[view], latent)
        advance(len(chunk))
    encoded.problems = list(dict.fromkeys(encoded.problems))  # of all views of a picture
    whole = [picture for picture, own in views.items() if all(view in latents for view in own)]
    if not whole:
        raise ValueError(f"No picture of this folder can be read. {encoded.problems[0]}")
    encoded.latents = {
        picture: {
            (side, place): latents[picture, side, size] for place, size in enumerate(sizes[picture]) for side in sides
        }
        for picture in whole
    }
    encoded.sizes = {picture: sizes[picture] for picture in whole}
    _reduce_masks(wholes, encoded)
    encoded.previews = _previews(wholes, encoded)
    return encoded


def _read_masks(
    sizes: dict[CaptionedImage, list[Size]], masks: MaskSource, step: int, encoded: Encoded
) -> dict[CaptionedImage, list[torch.Tensor]]:
    """The mask of each picture that has one, in each of its sizes; before the slow work, since they may be wrong.

    step: pixels to a side of a place of the latents.
    """
    found: dict[CaptionedImage, list[torch.Tensor]] = {}
    for picture, own in sizes.items() if masks != "off" else ():
        if picture.mask is None and masks == "files":
            continue
        host.raise_if_cancelled()
        try:
            whole = [load_mask(picture, size, masks == "files or alpha") for size in own]
        except ValueError as error:
            if picture.mask is not None:
                raise
            encoded.problems.append(str(error))  # the picture itself is broken
            continue
        if whole[0] is not None:
            found[picture] = [mask for mask in whole if mask is not None]
    black = [picture.name for picture, own in found.items() if any(is_black(mask, step) for mask in own)]
    if black:
        more = f" (and {len(black) - 5} more)" if len(black) > 5 else ""
        raise ValueError(
            f"The mask is all black, so that nothing would be learned, of {', '.join(black[:5])}{more}. Paint white "
            "what is to be learned, or take the mask or the picture away."
        )
    return found


def _reduce_masks(wholes: dict[CaptionedImage, list[torch.Tensor]], encoded: Encoded) -> None:
    for picture, own in wholes.items():
        views = encoded.latents.get(picture, {})
        encoded.masks[picture] = {
            (mirrored, place): _as_host(at_latent_size(own[place].flip(1) if mirrored else own[place], latent))
            for (mirrored, place), latent in views.items()
        }


def encode_captions(
    clip: CLIP, captions: list[str], known: KnownEncodings, advance: Callable[[int], None]
) -> dict[str, list]:
    """The conditioning of each caption."""
    conditionings = {}
    for caption in captions:
        host.raise_if_cancelled()
        tokens = clip.tokenize(caption)
        key = known.caption_key(tokens)  # first: encoding may take the tokens apart
        conditioning = known.get(key)
        if conditioning is None:
            conditioning = clip.encode_from_tokens_scheduled(tokens)
            known.put(key, conditioning)
        conditionings[caption] = host.with_caption(conditioning, caption)
        advance(1)
    return conditionings


def _as_host(mask: torch.Tensor) -> torch.Tensor:
    """As Set Latent Noise Mask gives it, (1, 1, h, w), also for latents of a video VAE."""
    return mask.reshape(1, 1, *mask.shape[-2:])


def _encoded_chunk(vae: VAE, chunk: list[View], encoded: Encoded) -> dict[View, torch.Tensor]:
    """The latents of pictures of one size; those that cannot be read are added to the problems."""
    loaded: dict[View, torch.Tensor] = {}
    for picture, mirrored, size in chunk:
        try:
            pixels = load_image(picture, size)
        except ValueError as error:
            encoded.problems.append(str(error))
        else:
            loaded[picture, mirrored, size] = pixels.flip(1) if mirrored else pixels
    if not loaded:
        return {}
    samples = vae.encode(torch.stack(list(loaded.values())))
    # A clone, since a view would keep and save the whole batch.
    return {view: sample.clone() for view, sample in zip(loaded, samples.split(1), strict=True)}


def _previews(masks: dict[CaptionedImage, list[torch.Tensor]], encoded: Encoded) -> dict[CaptionedImage, torch.Tensor]:
    """The first pictures as they were cut; what their masks leave out is pale."""
    previews = {}
    for picture in list(encoded.latents)[:SHOWN]:
        with suppress(ValueError):  # deleted since it was encoded: there is one picture less to show
            pixels = load_image(picture, encoded.sizes[picture][0])
            if picture in masks:
                pixels = 1 - (1 - pixels) * (_PALE + (1 - _PALE) * masks[picture][0][..., None])
            previews[picture] = pixels
    return previews


def _chunks(views: list[View], count: int) -> list[list[View]]:
    """Pictures of one size, at most `count` at a time."""
    groups: dict[Size, list[View]] = {}
    for view in views:
        groups.setdefault(view[2], []).append(view)
    return [group[start : start + count] for group in groups.values() for start in range(0, len(group), count)]
