"""Browsing a folder: every image in it with what is wrong with it, to be looked at before it is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .captions import CaptionLines, ImageFiles
from .finding import find_images
from .folder import captioned_image
from .image import CaptionedImage
from .opening import ImageHeader, read_header


@dataclass(frozen=True)
class BrowsedImage:
    """An image as it is looked at before it is used."""

    files: ImageFiles
    header: ImageHeader | None = None  # None if it cannot be read
    image: CaptionedImage | None = None  # None if it cannot be used
    problem: str = ""  # why it cannot be used


@dataclass(frozen=True)
class Browsed:
    """What `browse_folder` found."""

    images: tuple[BrowsedImage, ...]  # in natural order: the folder itself, then its subfolders
    unmatched_masks: tuple[str, ...]  # names of masks without an image
    unused: tuple[str, ...]  # sentences that name other files and folders that are not used


def browse_folder(
    folder: Path, trigger: str = "", lines: CaptionLines = "one per epoch", allowed: Sequence[Path] = ()
) -> Browsed:
    """Return all images of a folder, those that `scan_folder` would skip or refuse too, each with its problem.

    Args:
        folder: the folder.
        trigger: as for scan_folder.
        lines: as for scan_folder.
        allowed: as for scan_folder.

    Raises:
        ValueError: the folder cannot be read, or a subfolder asks for too many repeats.
    """
    found = find_images(folder, allowed=allowed)
    images = tuple(browse_image(files, trigger, lines) for files in found.images)
    return Browsed(images, tuple(found.unmatched_masks), found.unused.sentences())


def browse_image(files: ImageFiles, trigger: str = "", lines: CaptionLines = "one per epoch") -> BrowsedImage:
    """Return one image, whatever is wrong with it; the arguments are those of `browse_folder`."""
    try:
        header = read_header(files.path, files.name)
    except ValueError as error:
        return BrowsedImage(files, problem=str(error))
    try:
        return BrowsedImage(files, header, captioned_image(files, header, trigger, lines))
    except ValueError as error:
        return BrowsedImage(files, header, problem=str(error))
