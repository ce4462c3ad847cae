"""The plan of a dataset: sizes and variants of its images; and the lists of latents and conditionings it becomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...aclora_core.dataset import (
    CaptionedImage,
    CaptionLines,
    Scan,
    Variant,
    bucket_sizes,
    folder_fingerprint,
    scan_folder,
    variants,
)
from ..host import VARIANT_KEY
from ..paths import shown
from .encode import EncodedFolder, EncodedImage, Size, View
from .folders import allowed_folders, resolve_folder

NONE = "none"  # the option of the regularisation input that stands for no folder


@dataclass(frozen=True)
class VariantOptions:
    """Which variants of each image are made; see `variants`."""

    flip: bool
    shuffles: int
    kept_tags: int
    dropout: float
    trigger: str


@dataclass(frozen=True)
class FolderPlan:
    """What is made of the images of one folder."""

    scan: Scan
    sizes: dict[CaptionedImage, list[Size]]  # first that of the main resolution
    too_small: dict[int, list[CaptionedImage]]  # images by the further resolution that they are too small for
    variants: dict[CaptionedImage, list[Variant]]


def scan_folders(
    folder: str, regularisation: str = NONE, trigger: str = "", lines: CaptionLines = "one per epoch"
) -> list[Scan]:
    """Scan the folder of the style and, if there is one, that of the regularisation images.

    Regularisation images get no trigger word. Either folder may lie inside the other.

    Raises:
        ValueError: a folder cannot be used, or both are the same.
    """
    style = resolve_folder(folder)
    if regularisation == NONE:
        return [scan_folder(style, trigger, lines=lines, allowed=allowed_folders())]
    try:
        other = resolve_folder(regularisation)
        if style == other:
            raise ValueError(
                f'the folder "{shown(folder)}" is chosen for the style too. Regularisation images must not show the '
                "style: choose another folder for them, or none."
            )
        allowed = allowed_folders()
        kept = scan_folder(other, without=style, lines=lines, allowed=allowed)
    except ValueError as error:
        raise ValueError(f"regularisation: {error}") from error
    return [scan_folder(style, trigger, without=other, lines=lines, allowed=allowed), kept]


def fingerprint(folder: str, regularisation: str) -> str:
    """Return a hash that changes with every edit of a file that `scan_folders` would read."""
    names = [folder] if regularisation == NONE else [folder, regularisation]
    return " ".join(folder_fingerprint(resolve_folder(name), allowed_folders()) for name in names)


def plan_folder(
    scan: Scan, resolution: int, further: Sequence[int], multiple: int, options: VariantOptions
) -> FolderPlan:
    """Choose the sizes and the variants of each image.

    Args:
        scan: the images.
        resolution: the main resolution.
        further: more resolutions, which images that are too small for them do without.
        multiple: what all sides must be multiples of.
        options: which variants are made.
    """
    sizes: dict[CaptionedImage, list[Size]] = {}
    too_small: dict[int, list[CaptionedImage]] = {}
    variants_of: dict[CaptionedImage, list[Variant]] = {}
    for image in scan.images:
        sizes[image], too_large = bucket_sizes(image, resolution, further, multiple)
        for each in too_large:
            too_small.setdefault(each, []).append(image)
        variants_of[image] = variants(
            image.caption,
            options.flip,
            options.shuffles,
            options.kept_tags,
            options.dropout,
            len(sizes[image]),
            image.other_captions,
            options.trigger,
        )
    return FolderPlan(scan, sizes, too_small, variants_of)


def captions_of(plans: Sequence[FolderPlan]) -> list[str]:
    """Return all captions that have to be encoded, each once."""
    captions: dict[str, None] = {}
    for plan in plans:
        for own in plan.variants.values():
            captions.update((variant.caption, None) for variant in own)
    return list(captions)


def output_lists(
    plans: Sequence[FolderPlan], folders: Sequence[EncodedFolder], conditionings: dict[str, list[Any]], weight: float
) -> tuple[list[dict[str, Any]], list[list[Any]]]:
    """Return a latent and a conditioning for each variant of each image, repeats included.

    Args:
        plans: for the style and, if there is one, for the regularisation folder.
        folders: the encoded images of each plan.
        conditionings: by caption.
        weight: of each regularisation image.
    """
    latents: list[dict[str, Any]] = []
    conditioning: list[list[Any]] = []
    index = 0
    for plan, encoded in zip(plans, folders, strict=True):
        regularisation = {"regularisation": weight} if plan is not plans[0] else {}
        for image, own in encoded.images.items():
            variants_of = plan.variants[image]
            plain = _latent_dicts(own)
            for _ in range(image.repeats):
                for number, variant in enumerate(variants_of):
                    latent = plain[View(variant.mirrored, own.sizes[variant.size_index])]
                    if len(variants_of) > 1 or regularisation:
                        latent = {**latent, VARIANT_KEY: {"picture": index, "variant": number, **regularisation}}
                    latents.append(latent)
                    conditioning.append(conditionings[variant.caption])
                index += 1
    return latents, conditioning


def _latent_dicts(image: EncodedImage) -> dict[View, dict[str, Any]]:
    """The image's latents as ComfyUI hands them from node to node."""
    found: dict[View, dict[str, Any]] = {}
    for view, latent in image.latents.items():
        found[view] = {"samples": latent}
        if image.masks:
            found[view]["noise_mask"] = image.masks[view]
    return found
