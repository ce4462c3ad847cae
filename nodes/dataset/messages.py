"""What the dataset node says about its pictures, in sentences."""

from __future__ import annotations

from collections.abc import Iterable

from ...aclora_core.dataset import cropped_fraction, upscale_factor
from ...aclora_core.text import count_noun, name_list
from .encode import Encoded, Size
from .plan import Plan


def summaries(encoded: list[Encoded], weight: float) -> list[str]:
    """What there is: the style's pictures, and where there are any those for regularisation, with their weight."""
    lines = [f"{_pictures(encoded[0], 'picture')}: {_counts(own[0] for own in encoded[0].sizes.values())}."]
    further = [size for own in encoded[0].sizes.values() for size in own[1:]]
    if further:
        lines.append(f"Some of the time in other sizes: {_counts(further)}.")
    if len(encoded) > 1:
        sizes = _counts(own[0] for own in encoded[1].sizes.values())
        lines.append(f"{_pictures(encoded[1], 'regularisation picture')}, which count {weight:g} each: {sizes}.")
    masked = sum(len(each.masks) for each in encoded)
    if masked:
        lines.append(f"{count_noun(masked, 'picture')} with a mask; what it leaves out is pale below.")
    return lines


def remarks(plans: list[Plan], encoded: list[Encoded]) -> list[str]:
    """What the user may want to mend, though training can go on."""
    found = [_remarks(encoded[0], "picture", "write one or set a trigger word")]
    found += [_remarks(each, "regularisation picture", "write what it shows") for each in encoded[1:]]
    lines = [line for lines in found for line in lines]
    for plan, each in zip(plans, encoded, strict=True):
        for resolution, pictures in plan.too_small.items():
            names = [picture.name for picture in pictures if picture in each.latents]
            if names:
                count = count_noun(len(names), "picture")
                lines.append(f"{count} smaller than resolution {resolution}, so not shown in it: {name_list(names)}.")
        if plan.scan.spare_masks:
            count = count_noun(len(plan.scan.spare_masks), "mask")
            lines.append(f"{count} without a picture of the same name: {name_list(list(plan.scan.spare_masks))}.")
    if len(encoded) > 1 and _total(encoded[1]) > _total(encoded[0]):
        lines.append(
            f"An epoch has {_total(encoded[1])} regularisation pictures and {_total(encoded[0])} of the style, so "
            "most of the training goes by without it. Take fewer, or repeat the style's: put them into a subfolder "
            "named 3_style."
        )
    return lines


def _remarks(encoded: Encoded, noun: str, advice: str) -> list[str]:
    main = {picture: own[0] for picture, own in encoded.sizes.items()}
    enlarged = [p.name for p, size in main.items() if upscale_factor(p, size) > 1]
    cropped = [p.name for p, size in main.items() if cropped_fraction(p, size) > 1 / 3]
    silent = [p.name for p in main if not p.caption]
    found = [
        (enlarged, "smaller than the resolution and drawn larger, which may look soft"),
        (cropped, "so long that more than a third was cut off"),
        (silent, f"without a caption; {advice}"),
    ]
    return [f"{count_noun(len(names), noun)} {text}: {name_list(names)}." for names, text in found if names]


def _pictures(encoded: Encoded, noun: str) -> str:
    total, different = _total(encoded), len(encoded.latents)
    return count_noun(different, noun) + (f", {total} with repeats" if total != different else "")


def _total(encoded: Encoded) -> int:
    return sum(picture.repeats for picture in encoded.latents)


def _counts(sizes: Iterable[Size]) -> str:
    counts: dict[Size, int] = {}
    for size in sizes:
        counts[size] = counts.get(size, 0) + 1
    return ", ".join(f"{number} at {width} × {height}" for (width, height), number in sorted(counts.items()))
