"""What the dataset node reports about its images, in sentences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...aclora_core.dataset import cropped_fraction, upscale_factor
from ...aclora_core.text import count_noun, name_list
from .caption_messages import caption_remarks, repeat_remarks
from .encode import EncodedFolder, Size
from .plan import FolderPlan
from .sheets import MUCH_CROPPED, shown_count, size_text

SHOWN_SKIPPED = 20
IMAGE, REGULARISATION_IMAGE = "image", "regularisation image"
_STYLE_ADVICE = "write one or set a trigger word"  # for an image of the style without a caption


def summaries(folders: Sequence[EncodedFolder], weight: float) -> list[str]:
    """Sum up what was loaded: images, sizes, regularisation images and masks.

    Args:
        folders: that of the style and, if there is one, that of the regularisation images.
        weight: of each regularisation image.
    """
    style = folders[0]
    lines = [f"{_image_count(style, IMAGE)}: {_size_counts(_main_sizes(style))}."]
    further = [size for image in style.images.values() for size in image.sizes[1:]]
    if further:
        lines.append(f"Also used at other sizes: {_size_counts(further)}.")
    for regularisation in folders[1:]:
        count = _image_count(regularisation, REGULARISATION_IMAGE)
        lines.append(f"{count}, with a weight of {weight:g} each: {_size_counts(_main_sizes(regularisation))}.")
    masked = sum(bool(image.masks) for folder in folders for image in folder.images.values())
    if masked:
        lines.append(f"{count_noun(masked, IMAGE)} with a mask; masked-out parts are pale below.")
    return lines


def skipped_images(plans: Sequence[FolderPlan], folders: Sequence[EncodedFolder]) -> list[str]:
    """Return a sentence for each image that was skipped, first those whose header cannot be read; not too many."""
    lines: list[str] = []
    for plan in plans:
        lines += plan.scan.problems
    for folder in folders:
        lines += folder.problems
    more = len(lines) - SHOWN_SKIPPED
    return lines if more <= 0 else [*lines[:SHOWN_SKIPPED], f"{count_noun(more, 'more image')} skipped."]


def remarks(plans: Sequence[FolderPlan], folders: Sequence[EncodedFolder], prompt_syntax: bool = False) -> list[str]:
    """Return what the user may want to improve; training works without it."""
    lines: list[str] = []
    for number, folder in enumerate(folders):
        noun, advice = (REGULARISATION_IMAGE, "describe what it shows") if number else (IMAGE, _STYLE_ADVICE)
        lines += _quality_remarks(folder, noun)
        lines += caption_remarks(list(folder.images), noun, advice, prompt_syntax)
        lines += repeat_remarks(folder.images)
    for plan, folder in zip(plans, folders, strict=True):
        is_style = plan is plans[0]
        lines += _plan_remarks(plan, folder, IMAGE if is_style else REGULARISATION_IMAGE)
        lines += plan.scan.unused if is_style else map(_in_regularisation_folder, plan.scan.unused)
    if len(folders) > 1:
        lines += _balance_remarks(_epoch_images(folders[0]), _epoch_images(folders[1]))
    return lines


def not_shown(folder: EncodedFolder) -> list[str]:
    """Return a sentence where the contact sheets do not show all images."""
    shown, count = shown_count(folder), len(folder.images)
    if shown == count:
        return []
    return [f"The first {shown} of {count} images are shown here; the button Images and captions shows all."]


def _quality_remarks(folder: EncodedFolder, noun: str) -> list[str]:
    upscaled, cropped = [], []
    for image, encoded in folder.images.items():
        if upscale_factor(image, encoded.sizes[0]) > 1:
            upscaled.append(image.name)
        if cropped_fraction(image, encoded.sizes[0]) > MUCH_CROPPED:
            cropped.append(image.name)
    found = [
        (upscaled, "smaller than the resolution and scaled up, which may look soft"),
        (cropped, "so elongated that more than a third was cropped"),
    ]
    return [f"{count_noun(len(names), noun)} {text}: {name_list(names)}." for names, text in found if names]


def _plan_remarks(plan: FolderPlan, folder: EncodedFolder, noun: str) -> list[str]:
    lines = []
    moving = [image.name for image in folder.images if image.moving]
    if moving:
        lines.append(
            f"{count_noun(len(moving), noun)} with several frames or pages, of which only the first is learned: "
            f"{name_list(moving)}."
        )
    for resolution, images in plan.too_small.items():
        names = [image.name for image in images if image in folder.images]
        if names:
            count = count_noun(len(names), noun)
            lines.append(f"{count} smaller than resolution {resolution}, so left out there: {name_list(names)}.")
    masks = plan.scan.unmatched_masks
    article = "an" if noun == IMAGE else "a"
    if masks:
        lines.append(f"{count_noun(len(masks), 'mask')} without {article} {noun} of the same name: {name_list(masks)}.")
    return lines


def _in_regularisation_folder(line: str) -> str:
    return f"In the regularisation folder: {line[0].lower()}{line[1:]}"


def _balance_remarks(style: int, regularisation: int) -> list[str]:
    if regularisation <= style:
        return []
    return [
        f"An epoch has {count_noun(regularisation, REGULARISATION_IMAGE)} and {style} of the style, so most of the "
        "training does not show the style. Use fewer, or repeat the style's: put them into a subfolder named 3_style."
    ]


def _image_count(folder: EncodedFolder, noun: str) -> str:
    with_repeats = _epoch_images(folder)
    count = count_noun(len(folder.images), noun)
    return count if with_repeats == len(folder.images) else f"{count}, {with_repeats} with repeats"


def _epoch_images(folder: EncodedFolder) -> int:
    return sum(image.repeats for image in folder.images)


def _main_sizes(folder: EncodedFolder) -> list[Size]:
    return [image.sizes[0] for image in folder.images.values()]


def _size_counts(sizes: Iterable[Size]) -> str:
    counts: dict[Size, int] = {}
    for size in sizes:
        counts[size] = counts.get(size, 0) + 1
    if len(counts) == 1 and sum(counts.values()) > 1:
        return f"all at {size_text(*counts)}"
    return ", ".join(f"{count} at {size_text(size)}" for size, count in sorted(counts.items()))
