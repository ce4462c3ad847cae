"""Encoding: images through the VAE and captions through the CLIP, unless the cache knows them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from torch import Tensor, stack

from ...aclora_core.dataset import CaptionedImage, at_latent_size, is_black, load_image, load_mask
from ...aclora_core.text import name_list
from .. import host
from ..host import Caption, KnownEncodings

if TYPE_CHECKING:
    from comfy.sd import CLIP, VAE

BATCH_SIZE = 4  # images encoded at once
_NAMES_IN_ERROR = 5

_Item = TypeVar("_Item")
Size = tuple[int, int]  # (width, height) in pixels
MaskSource = Literal["files", "files or alpha", "off"]  # options of the node's masks input
MasksBySize = dict[Size, Tensor]  # (height, width) in 0..1


class View(NamedTuple):
    """One form in which an image is encoded."""

    mirrored: bool
    size: Size


ImageView = tuple[CaptionedImage, View]


@dataclass
class EncodedImage:
    """The latents of an image, and the masks that go with them."""

    sizes: list[Size]  # first that of the main resolution
    latents: dict[View, Tensor]  # (1, channels, ..., h, w)
    masks: dict[View, Tensor]  # (1, 1, h, w); empty if the image has no mask


@dataclass
class EncodedFolder:
    """The images of one folder, in the order of the scan, without those that cannot be read."""

    images: dict[CaptionedImage, EncodedImage] = field(default_factory=dict)
    masks: dict[CaptionedImage, MasksBySize] = field(default_factory=dict)  # of the images that have one
    problems: list[str] = field(default_factory=list)  # a sentence for each image that was skipped


def encode_images(
    vae: VAE,
    sizes: dict[CaptionedImage, list[Size]],
    flip: bool,
    mask_source: MaskSource,
    known: KnownEncodings,
    advance: Callable[[int], None],
) -> EncodedFolder:
    """Encode the images of a folder, those of one size in small batches, which several processes share.

    Args:
        vae: the host's VAE.
        sizes: the sizes of each image, first that of the main resolution.
        flip: whether each image is also encoded mirrored. The latent of a mirrored image is not the mirrored latent, so
            it goes through the VAE too.
        mask_source: where masks come from.
        known: the cache.
        advance: called with the number of views that were finished.

    Raises:
        ValueError: a mask cannot be used, or no image can be read.
    """
    problems: list[str] = []
    masks = _load_masks(sizes, mask_source, vae.spacial_compression_encode(), problems)
    views = _views_of(sizes, flip)
    latents = _encode_views(vae, views, known, advance, problems)
    encoded = EncodedFolder(problems=list(dict.fromkeys(problems)))  # each view of an image has reported the same
    for image, own_views in views.items():
        if all((image, view) in latents for view in own_views):
            own = {view: latents[image, view] for view in own_views}
            encoded.images[image] = EncodedImage(sizes[image], own, _latent_masks(masks.get(image, {}), own))
    if not encoded.images:
        raise ValueError(f"No image of this folder can be read. {encoded.problems[0]}")
    encoded.masks = masks
    return encoded


def encode_captions(
    clip: CLIP,
    captions: Iterable[str],
    known: KnownEncodings,
    advance: Callable[[int], None],
    is_text: bool = True,
    trigger: str = "",
    dataset: str = "",
) -> dict[str, list[Any]]:
    """Return the conditioning of each caption, from the cache or the CLIP.

    Args:
        clip: the host's CLIP.
        captions: to be encoded.
        known: the cache.
        advance: called with the number of captions that were finished.
        is_text: whether captions are text, rather than prompts in the host's syntax.
        trigger: the trigger word, which is recorded in the conditionings.
        dataset: the name of the folder, which is recorded too.
    """
    conditionings = {}
    for round_ in _rounds(list(captions)):
        own: list[tuple[str, Any]] = []
        for caption in round_[host.processes().rank :][:1]:
            host.raise_if_cancelled()
            own.append((caption, _encode_caption(clip, Caption(caption, is_text), known)))
        for caption, conditioning in itertools.chain(*host.processes().gather(own)):
            conditionings[caption] = host.with_caption(conditioning, caption, is_text, trigger, dataset)
        advance(len(round_))
    return conditionings


def _encode_caption(clip: CLIP, caption: Caption, known: KnownEncodings) -> Any:
    """Return the conditioning of a caption, from the cache or the CLIP."""
    tokens = host.tokenize(clip, caption)
    key = known.caption_key(tokens)  # before encoding, which may modify the tokens
    conditioning = known.get(key)
    if conditioning is None:
        conditioning = host.encode_tokens(clip, tokens)
        known.put(key, conditioning)
    return conditioning


def _rounds(items: list[_Item]) -> list[list[_Item]]:
    """Return items in rounds of one for each process."""
    size = host.processes().size
    return [items[start : start + size] for start in range(0, len(items), size)]


def _load_masks(
    sizes: dict[CaptionedImage, list[Size]], source: MaskSource, step: int, problems: list[str]
) -> dict[CaptionedImage, MasksBySize]:
    """Load the masks of all images that have one; before encoding, which is slow, since they may be wrong.

    Args:
        sizes: the sizes of each image.
        source: where masks come from.
        step: pixels per side of a latent position.
        problems: receives a sentence for each image that cannot be read.
    """
    masks: dict[CaptionedImage, MasksBySize] = {}
    if source == "off":
        return masks
    for image, own_sizes in sizes.items():
        if image.mask is None and source == "files":
            continue
        host.raise_if_cancelled()
        try:
            loaded = {size: load_mask(image, size, source == "files or alpha") for size in own_sizes}
        except ValueError as error:
            if image.mask is not None:
                raise
            problems.append(str(error))  # the image itself is damaged
            continue
        own_masks = {size: mask for size, mask in loaded.items() if mask is not None}
        if own_masks:
            masks[image] = own_masks
    _reject_black(masks, step)
    return masks


def _reject_black(masks: dict[CaptionedImage, MasksBySize], step: int) -> None:
    black = [image.name for image, own in masks.items() if any(is_black(mask, step) for mask in own.values())]
    if black:
        raise ValueError(
            f"A mask is all black, so nothing would be learned: {name_list(black, _NAMES_IN_ERROR)}. Paint the parts "
            "to learn white, or remove the mask or the image."
        )


def _views_of(sizes: dict[CaptionedImage, list[Size]], flip: bool) -> dict[CaptionedImage, list[View]]:
    views: dict[CaptionedImage, list[View]] = {}
    for image, own_sizes in sizes.items():
        views[image] = []
        for size in own_sizes:
            views[image].append(View(False, size))
            if flip:
                views[image].append(View(True, size))
    return views


def _encode_views(
    vae: VAE,
    views: dict[CaptionedImage, list[View]],
    known: KnownEncodings,
    advance: Callable[[int], None],
    problems: list[str],
) -> dict[ImageView, Tensor]:
    """The latents of all views, from the cache or the VAE; those of damaged images are missing."""
    latents: dict[ImageView, Tensor] = {}
    missing: dict[ImageView, str | None] = {}  # with their keys in the cache
    for image, own_views in views.items():
        for view in own_views:
            host.raise_if_cancelled()
            key = _key(known, (image, view))
            latent = known.get(key)
            if latent is None:
                missing[image, view] = key
            else:
                latents[image, view] = latent
                advance(1)
    # A video VAE would take a batch for the frames of one clip.
    batch_size = BATCH_SIZE if getattr(vae, "latent_dim", 2) == 2 else 1
    numbers = {image_view: number for number, image_view in enumerate(_in_order(views))}
    by_number = list(numbers)
    if len(set(host.processes().gather(len(by_number)))) > 1:
        raise ValueError("The processes of this training see different images. Give all machines the same folder.")
    wanted = sorted(set().union(*host.processes().gather({numbers[image_view] for image_view in missing})))
    for round_ in _rounds(_batches([by_number[number] for number in wanted], batch_size)):
        host.raise_if_cancelled()
        own: dict[int, Tensor] = {}
        own_problems: list[str] = []
        for batch in round_[host.processes().rank :][:1]:
            encoded = _encode_batch(vae, batch, own_problems)
            own = {numbers[image_view]: latent for image_view, latent in encoded.items()}
        for found, others in host.processes().gather((own, own_problems)):
            latents |= {by_number[number]: latent for number, latent in found.items()}
            problems += others
        for image_view in (by_number[number] for number in own):
            # Compared again, so that a file replaced in the meantime is not stored under the key of the old one.
            key = missing.get(image_view)
            if key is not None and _key(known, image_view) == key:
                known.put(key, latents[image_view])
        advance(sum(len(batch) for batch in round_))
    return latents


def _in_order(views: dict[CaptionedImage, list[View]]) -> list[ImageView]:
    """Return all views in the order that every process has them in."""
    return [(image, view) for image, own_views in views.items() for view in own_views]


def _key(known: KnownEncodings, image_view: ImageView) -> str | None:
    image, view = image_view
    return known.image_key(image, view.mirrored, view.size)


def _batches(views: list[ImageView], batch_size: int) -> list[list[ImageView]]:
    """Group views of one size, at most `batch_size` in each group."""
    by_size: dict[Size, list[ImageView]] = {}
    for image, view in views:
        by_size.setdefault(view.size, []).append((image, view))
    batches = []
    for group in by_size.values():
        for start in range(0, len(group), batch_size):
            batches.append(group[start : start + batch_size])
    return batches


def _encode_batch(vae: VAE, batch: list[ImageView], problems: list[str]) -> dict[ImageView, Tensor]:
    """The latents of views of one size; images that cannot be read are added to the problems."""
    loaded: dict[ImageView, Tensor] = {}
    for image, view in batch:
        try:
            pixels = load_image(image, view.size)
        except ValueError as error:
            problems.append(str(error))
        else:
            loaded[image, view] = pixels.flip(1) if view.mirrored else pixels
    if not loaded:
        return {}
    samples = vae.encode(stack(list(loaded.values())))
    # A clone, since a slice would keep the whole batch in memory and in the cache.
    return {image_view: sample.clone() for image_view, sample in zip(loaded, samples.split(1), strict=True)}


def _latent_masks(masks: MasksBySize, latents: dict[View, Tensor]) -> dict[View, Tensor]:
    """The masks at latent size, (1, 1, h, w) as Set Latent Noise Mask gives them, also for a video VAE."""
    reduced = {}
    for view, latent in latents.items():
        mask = masks.get(view.size)
        if mask is not None:
            small = at_latent_size(mask.flip(1) if view.mirrored else mask, latent)
            reduced[view] = small.reshape(1, 1, *small.shape[-2:])
    return reduced
