"""Pictures through the VAE and captions through the CLIP, unless both are known from before."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ..aclora_core import images
from . import host
from .host.known_encodings import KnownEncodings

if TYPE_CHECKING:
    from comfy.sd import CLIP, VAE

BATCH = 4  # pictures encoded at once
SHOWN = 12  # pictures on the contact sheet
View = tuple[images.Picture, bool]  # a picture, and whether it is mirrored


@dataclass
class Encoded:
    """What became of the pictures. Latents are in the order of the scan."""

    # For each picture a latent (1, channels, ...), and where asked for that of the mirrored picture.
    latents: dict[images.Picture, list[torch.Tensor]] = field(default_factory=dict)
    buckets: dict[images.Picture, tuple[int, int]] = field(default_factory=dict)
    previews: dict[images.Picture, torch.Tensor] = field(default_factory=dict)  # (height, width, 3)
    problems: list[str] = field(default_factory=list)


def encode_pictures(
    vae: VAE,
    scan: images.Scan,
    resolution: int,
    sides: tuple[bool, ...],
    known: KnownEncodings,
    advance: Callable[[int], None],
) -> Encoded:
    """Those of one size in small batches; pictures that cannot be read become problems.

    sides: for each latent that a picture gets whether it is mirrored. The latent of a mirrored picture is not the
    mirrored latent, so it goes through the VAE too.
    """
    step = images.bucket_step(resolution, vae.spacial_compression_encode())
    buckets = {p: images.bucket_for(p.width, p.height, resolution, step) for p in scan.pictures}
    # A video VAE would take a batch for the frames of one clip.
    batch = BATCH if getattr(vae, "latent_dim", 2) == 2 else 1
    encoded = Encoded()
    keys: dict[View, str | None] = {}
    latents: dict[View, torch.Tensor] = {}
    for view in ((picture, side) for picture in scan.pictures for side in sides):
        host.raise_if_cancelled()
        keys[view] = known.picture_key(*view, buckets[view[0]])
        latent = known.get(keys[view])
        if latent is not None:
            latents[view] = latent
            advance(1)
    for chunk in _chunks([view for view in keys if view not in latents], buckets, batch):
        host.raise_if_cancelled()
        for view, latent in _encoded_chunk(vae, chunk, buckets, encoded).items():
            latents[view] = latent
            # Asked again, so that a file replaced in the meantime is not stored under the key of the old one.
            if known.picture_key(*view, buckets[view[0]]) == keys[view]:
                known.put(keys[view], latent)
        advance(len(chunk))
    encoded.problems = list(dict.fromkeys(encoded.problems))  # of both sides of a picture
    whole = [picture for picture in scan.pictures if all((picture, side) in latents for side in sides)]
    if not whole:
        raise ValueError(f"None of the {len(scan.pictures)} pictures can be read. {encoded.problems[0]}")
    encoded.latents = {picture: [latents[picture, side] for side in sides] for picture in whole}
    encoded.buckets = {picture: buckets[picture] for picture in whole}
    encoded.previews = _previews(scan, encoded)
    return encoded


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


def _encoded_chunk(
    vae: VAE, chunk: list[View], buckets: dict[images.Picture, tuple[int, int]], encoded: Encoded
) -> dict[View, torch.Tensor]:
    """The latents of pictures of one size; those that cannot be read are added to the problems."""
    loaded: dict[View, torch.Tensor] = {}
    for picture, mirrored in chunk:
        try:
            pixels = images.load(picture, buckets[picture])
        except ValueError as error:
            encoded.problems.append(str(error))
        else:
            loaded[picture, mirrored] = pixels.flip(1) if mirrored else pixels
    if not loaded:
        return {}
    samples = vae.encode(torch.stack(list(loaded.values())))
    # A clone, since a view would keep and save the whole batch.
    return {view: sample.clone() for view, sample in zip(loaded, samples.split(1), strict=True)}


def _previews(scan: images.Scan, encoded: Encoded) -> dict[images.Picture, torch.Tensor]:
    previews = {}
    for picture in scan.pictures[:SHOWN]:
        if picture in encoded.latents:
            with suppress(ValueError):  # deleted since it was encoded: there is one picture less to show
                previews[picture] = images.load(picture, encoded.buckets[picture])
    return previews


def _chunks(views: list[View], buckets: dict[images.Picture, tuple[int, int]], size: int) -> list[list[View]]:
    """Pictures of one size, at most `size` at a time."""
    groups: dict[tuple[int, int], list[View]] = {}
    for view in views:
        groups.setdefault(buckets[view[0]], []).append(view)
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]
