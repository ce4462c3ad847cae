"""What becomes of a folder: the sizes and the variants of its pictures, and in the end an entry for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...aclora_core.dataset import CaptionedImage, Scan, Variant, folder_fingerprint, scan_folder, bucket_sizes, variants
from .encode import Encoded, Size
from .folders import resolve_folder

NONE = "none"  # of the folders


@dataclass(frozen=True)
class Plan:
    """Of one folder."""

    scan: Scan
    sizes: dict[CaptionedImage, list[Size]]  # first that of the resolution
    too_small: dict[int, list[CaptionedImage]]  # for which of the further resolutions
    looks: dict[CaptionedImage, list[Variant]]


def scan_folders(folder: str, regularisation: str = NONE, trigger: str = "") -> list[Scan]:
    """The style's folder, and where there is one that of the regularisation pictures, which get no trigger word.

    One may lie in the other. Raises ValueError with what is wrong.
    """
    style = resolve_folder(folder)
    if regularisation == NONE:
        return [scan_folder(style, trigger)]
    other = resolve_folder(regularisation)
    if style == other:
        raise ValueError(
            f'The folder "{folder}" is chosen for the style and for regularisation. Regularisation pictures are those '
            "that do not show the style: choose another folder for them, or none."
        )
    return [scan_folder(style, trigger, without=other), scan_folder(other, without=style)]


def fingerprint(folder: str, regularisation: str) -> str:
    """Changes with every edit of a file that scan_folders would read."""
    folders: list[Path] = [resolve_folder(name) for name in (folder, regularisation) if name != NONE]
    return " ".join(map(folder_fingerprint, folders))


def plan(scan: Scan, resolution: int, more: Sequence[int], multiple: int, looks: dict[str, Any]) -> Plan:
    """more: further resolutions. multiple: of which all sides must be. looks: what variants are made, by name."""
    sizes: dict[CaptionedImage, list[Size]] = {}
    too_small: dict[int, list[CaptionedImage]] = {}
    for picture in scan.pictures:
        sizes[picture], missed = bucket_sizes(picture, resolution, more, multiple)
        for each in missed:
            too_small.setdefault(each, []).append(picture)
    shown = {picture: variants(picture.caption, **looks, sizes=len(own)) for picture, own in sizes.items()}
    return Plan(scan, sizes, too_small, shown)


def entries(
    plans: Sequence[Plan], encoded: Sequence[Encoded], conditionings: dict[str, list], weight: float
) -> tuple[list[dict], list[list]]:
    """A latent and a conditioning for each variant of each picture, repeats included; training picks among variants.

    Those of the second plan are for regularisation, with this weight.
    """
    latents, conditioning, number = [], [], 0
    for part, (own, found) in enumerate(zip(plans, encoded, strict=True)):
        mark = {"regularisation": weight} if part else {}
        for picture in found.latents:
            plain = _views(found, picture)
            looks = own.looks[picture]
            for _ in range(picture.repeats):
                for place, look in enumerate(looks):
                    view = plain[look.mirrored, look.size]
                    known = {"aclora": {"picture": number, "variant": place, **mark}}
                    latents.append({**view, **known} if len(looks) > 1 or mark else view)
                    conditioning.append(conditionings[look.caption])
                number += 1
    return latents, conditioning


def _views(encoded: Encoded, picture: CaptionedImage) -> dict[tuple[bool, int], dict]:
    masks = encoded.masks.get(picture, {})
    return {
        view: {"samples": latent} | ({"noise_mask": masks[view]} if masks else {})
        for view, latent in encoded.latents[picture].items()
    }
