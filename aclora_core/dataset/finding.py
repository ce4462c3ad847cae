"""Finding the images of a folder by the names in it, with their captions, masks and repeats."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .caption_files import is_backup
from .captions import CAPTION_SUFFIXES, ImageFiles, match_captions
from .listing import Listing, Unused, inside_name, list_folder, list_subfolder, real_paths
from .masks import find_masks, is_mask, is_mask_folder

_JPEG_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".mpo"}
_MODERN_SUFFIXES = {".webp", ".avif", ".avifs", ".heic", ".heif", ".hif", ".jxl"}
# These are tried, and their content decides. Those that need a plugin are named if it is not installed.
IMAGE_SUFFIXES = frozenset(
    _JPEG_SUFFIXES | _MODERN_SUFFIXES | {".png", ".apng", ".bmp", ".dib", ".gif", ".tif", ".tiff"}
)
MAX_REPEATS = 1000  # a folder named "2024_spring" is a date, not 2024 repeats
_COMPANIONS = frozenset({"readme", "license", "licence", "copying"})  # texts about a dataset, which nobody misses in it


@dataclass
class Found:
    """What the names in a folder and its direct subfolders say."""

    images: list[ImageFiles] = field(default_factory=list)  # in natural order: the folder itself, then its subfolders
    unmatched_masks: list[str] = field(default_factory=list)
    unused: Unused = field(default_factory=Unused)


def find_images(folder: Path, without: Path | None = None, allowed: Sequence[Path] = ()) -> Found:
    """Find the images of a folder and of its direct subfolders, and name what is not used; no file is opened.

    Args:
        folder: the folder.
        without: a subfolder to leave out.
        allowed: folders into which links may lead; anywhere if there are none.

    Raises:
        ValueError: the folder cannot be read, or a subfolder asks for too many repeats.
    """
    found, roots = Found(), real_paths(allowed)
    try:
        listing = list_folder(folder, "", roots, found.unused)
    except OSError as error:
        raise ValueError(
            f'The folder "{folder.name}" cannot be read: {error.strerror}. Check it or choose another folder.'
        ) from error
    _add_images(found, folder, "", listing, roots, 1)
    for subfolder in sorted(listing.folders, key=natural_key):
        repeats = _repeats(subfolder)
        if repeats == 0 or is_mask_folder(subfolder) or folder / subfolder == without:
            continue
        inside = list_subfolder(folder / subfolder, subfolder, roots, found.unused)
        for name in inside.folders:
            if not is_mask_folder(name) and folder / subfolder / name != without:
                found.unused.add("depth", f"{subfolder}/{name}")
        _add_images(found, folder, subfolder, inside, roots, repeats)
    return found


def find_image(folder: Path, name: str, allowed: Sequence[Path] = ()) -> ImageFiles:
    """Return the files of one image of a folder, by its name as `browse_folder` gives it.

    Raises:
        ValueError: there is no such image.
    """
    for files in find_images(folder, allowed=allowed).images:
        if files.name == name:
            return files
    raise ValueError("This image is no longer in the folder. Press Reload.")


def ignored_repeats(name: str, is_subfolder: bool = True) -> int:
    """Return the number of repeats that a folder's name asks for without getting them; 0 if it does not.

    Args:
        name: of the folder.
        is_subfolder: whether it lies in the scanned folder, so that "10_dogs" counts and "10 dogs" does not. In the
            name of the scanned folder itself neither counts.
    """
    match = re.match(r"([0-9]+)([^0-9])", name)
    if match is None or (is_subfolder and match[2] == "_"):
        return 0
    repeats = int(match[1])
    return repeats if 1 < repeats <= MAX_REPEATS else 0


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Return a key that sorts img2 before img10, ignoring case; the name itself breaks ties."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def _add_images(
    found: Found, folder: Path, subfolder: str, listing: Listing, roots: Sequence[str], repeats: int
) -> None:
    """Add the images directly in one subfolder ("": the folder itself), with their captions and masks."""
    place = folder / subfolder
    mask_files = {}
    for name in filter(is_mask_folder, listing.folders):
        inside = inside_name(subfolder, name)
        masks_listing = list_subfolder(place / name, inside, roots, found.unused)
        mask_files[name] = masks_listing.files
        for deeper in masks_listing.folders:
            found.unused.add("depth", inside_name(inside, deeper))
    masks, unmatched = find_masks(place, listing.files, mask_files, IMAGE_SUFFIXES)
    found.unmatched_masks += [path.relative_to(folder).as_posix() for path in unmatched]
    captions = match_captions(listing.files, listing.files)
    used_captions = set()
    for name in sorted(listing.files, key=natural_key):
        if is_mask(name) or not _has_suffix(name, IMAGE_SUFFIXES):
            continue
        caption = place / captions[name] if name in captions else None
        used_captions.add(captions.get(name))
        found.images.append(ImageFiles(place / name, inside_name(subfolder, name), caption, repeats, masks.get(name)))
    _add_unused(found.unused, subfolder, listing.files - used_captions)
    for name, files in mask_files.items():
        _add_unused(found.unused, inside_name(subfolder, name), files)


def _add_unused(unused: Unused, inside: str, files: Iterable[str]) -> None:
    """Add the files that are no images; those that are captions belong to none."""
    for name in files:
        is_companion = os.path.splitext(name)[0].lower() in _COMPANIONS or is_backup(name)
        if not is_companion and not _has_suffix(name, IMAGE_SUFFIXES):
            unused.add("caption" if _has_suffix(name, CAPTION_SUFFIXES) else "kind", inside_name(inside, name))


def _has_suffix(name: str, suffixes: Collection[str]) -> bool:
    return os.path.splitext(name)[1].lower() in suffixes


def _repeats(subfolder: str) -> int:
    match = re.match(r"([0-9]+)_", subfolder)
    repeats = int(match[1]) if match else 1
    if repeats > MAX_REPEATS:
        raise ValueError(
            f'The subfolder "{subfolder}" asks for {repeats} repeats of its images, more than {MAX_REPEATS}: '
            "rename it so that it starts with a smaller number, or not with a number and an underscore."
        )
    return repeats
