"""The contact sheets on the dataset node: the images as they are learned, with captions, sizes and remarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor

from ...aclora_core.dataset import CaptionedImage, cropped_fraction, load_image, upscale_factor
from ...aclora_core.inspection import cell_side, contact_sheet, extend
from ...aclora_core.text import count_noun
from .encode import EncodedFolder, MasksBySize, Size

MAX_SHOWN = 96  # images; decoding them takes a while each time
PER_SHEET = 16
_MASKED_OPACITY = 0.2  # of parts that are masked out
MUCH_CROPPED = 1 / 3


def contact_sheets(folder: EncodedFolder, advance: Callable[[int], None], dark: bool) -> Tensor | None:
    """Draw the first images of a folder as they were cropped, with masked-out parts pale.

    Args:
        folder: the encoded images.
        advance: called with the number of images that were drawn.
        dark: light letters on a dark background.

    Returns:
        The sheets: (sheets, height, width, 3), float32, 0 to 1; None where no image can be read any more.
    """
    shown = list(folder.images)[:MAX_SHOWN]
    small: dict[CaptionedImage, Tensor] = {}
    for image in shown:
        with suppress(ValueError):  # deleted since it was encoded
            size = folder.images[image].sizes[0]
            small[image] = _small(image, size, folder.masks.get(image, {}), cell_side(len(shown)))
        advance(1)
    sheets = [_sheet(folder, small, page, dark) for page in _pages(list(small))]
    height = max((sheet.shape[0] for sheet in sheets), default=0)
    if not height:
        return None
    return torch.stack([extend(sheet, height) for sheet in sheets])


def shown_count(folder: EncodedFolder) -> int:
    """Return how many of a folder's images are on its sheets."""
    return min(MAX_SHOWN, len(folder.images))


def image_remarks(image: CaptionedImage, size: Size) -> list[str]:
    """Return what is particular about an image that is learned at a size (width, height), in a few words each."""
    cropped = cropped_fraction(image, size)
    found = {
        "no caption": not image.has_caption,
        count_noun(1 + len(image.other_captions), "caption"): bool(image.other_captions),
        "scaled up": upscale_factor(image, size) > 1,
        f"{cropped:.0%} cropped": cropped > MUCH_CROPPED,
        "first frame only": image.moving,
        "with a mask": image.mask is not None,
        f"counts {image.repeats} times": image.repeats > 1,
    }
    return [remark for remark, applies in found.items() if applies]


def size_text(size: Size) -> str:
    """Return a size as "512 × 768"."""
    return f"{size[0]} × {size[1]}"


def _small(image: CaptionedImage, size: Size, masks: MasksBySize, side: int) -> Tensor:
    """Return an image, (height, width, 3), cropped as at a size and scaled down to fit into a square."""
    scale = min(1.0, side / max(size))
    small = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    pixels = load_image(image, small)
    mask = masks.get(size)
    if mask is None:
        return pixels
    opacity = F.interpolate(mask[None, None], pixels.shape[:2], mode="area")[0, 0, :, :, None]
    return 1 - (1 - pixels) * (_MASKED_OPACITY + (1 - _MASKED_OPACITY) * opacity)


def _sheet(
    folder: EncodedFolder, small: dict[CaptionedImage, Tensor], page: Sequence[CaptionedImage], dark: bool
) -> Tensor:
    notes = []
    for image in page:
        size = folder.images[image].sizes[0]
        notes.append(" · ".join([size_text(size), *image_remarks(image, size)]))
    return contact_sheet([small[image] for image in page], [image.caption for image in page], notes=notes, dark=dark)


def _pages(images: Sequence[CaptionedImage]) -> list[Sequence[CaptionedImage]]:
    """The images in pages of about equal length, so that the cells of all sheets are equally large."""
    pages = -(-len(images) // PER_SHEET)
    length = -(-len(images) // pages) if pages else 0
    return [images[start : start + length] for start in range(0, len(images), length)] if length else []
