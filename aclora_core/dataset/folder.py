"""Scanning a folder: which images it holds, with their captions, masks and repeats."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from .captions import ImageFiles, captions_by_stem, read_caption, with_trigger
from .opening import read_header
from .image import CaptionedImage, Scan
from .masks import find_masks, is_mask, is_mask_folder

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
MIN_SIDE = 32  # pixels; smaller images show nothing to learn from
MAX_REPEATS = 1000  # a folder named "2024_spring" is a date, not 2024 repeats
_SHOWN_ERRORS = 5


def scan_folder(folder: Path, trigger: str = "", without: Path | None = None) -> Scan:
    """Read the captions and the image headers of a folder and of its direct subfolders.

    A subfolder "N_name" counts N times, any other once; names that start with a dot are skipped. An image that cannot
    be read is skipped and named in `problems`. The caption is a text file beside the image (same stem, .txt or
    .caption). Masks are not images; find_masks says which image each belongs to.

    Args:
        folder: the folder.
        trigger: the word put in front of captions that lack it; it also stands for missing and empty captions.
        without: a subfolder to leave out.

    Raises:
        ValueError: there is no usable image, a caption is not UTF-8, or a side is shorter than MIN_SIDE pixels; the
            message names the files.
    """
    found, unmatched_masks = _find_images(folder, without)
    if not found:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(f'The folder "{folder.name}" has no images: add some ({kinds}) or choose another folder.')
    images: list[CaptionedImage] = []
    problems: list[str] = []
    errors: list[str] = []
    for files in found:
        try:
            width, height, _ = read_header(files.path, files.name)
        except ValueError as error:
            problems.append(str(error))
            continue
        try:
            images.append(_captioned_image(files, width, height, trigger))
        except ValueError as error:
            errors.append(str(error))
    if errors:
        more = len(errors) - _SHOWN_ERRORS
        raise ValueError("\n".join(errors[:_SHOWN_ERRORS]) + (f"\n(and {more} more)" if more > 0 else ""))
    if not images:
        raise ValueError(f'None of the {len(found)} images in "{folder.name}" can be used. {problems[0]}')
    return Scan(tuple(images), tuple(problems), tuple(unmatched_masks))


def folder_fingerprint(folder: Path) -> str:
    """Hash the names, sizes and modification times of all files that `scan_folder` would read; opens none of them."""
    digest = hashlib.sha256()
    for files in _find_images(folder)[0]:
        for path in (files.path, files.caption, files.mask):
            if path is None:
                continue
            status = path.stat()
            digest.update(f"{files.name}\0{path.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Return a key that sorts img2 before img10, ignoring case; the name itself breaks ties."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def _find_images(folder: Path, without: Path | None = None) -> tuple[list[ImageFiles], list[str]]:
    """Find the images of a folder, then of its direct subfolders, in natural order; and masks without an image."""
    found: list[ImageFiles] = []
    unmatched_masks: list[str] = []
    try:
        subfolders = sorted((item.name for item in _visible(folder) if item.is_dir()), key=natural_key)
        for subfolder in ("", *subfolders):
            repeats = _repeats(subfolder)
            if repeats == 0 or is_mask_folder(subfolder) or folder / subfolder == without:
                continue
            images, unmatched = _images_of(folder, subfolder, repeats)
            found += images
            unmatched_masks += unmatched
    except OSError as error:
        raise ValueError(
            f'The folder "{folder.name}" cannot be read: {error.strerror}. Check it or choose another folder.'
        ) from error
    return found, unmatched_masks


def _images_of(folder: Path, subfolder: str, repeats: int) -> tuple[list[ImageFiles], list[str]]:
    """The images directly in one subfolder ("": the folder itself), and the names of masks without an image."""
    place = folder / subfolder
    items = _visible(place)
    files = {item.name for item in items if item.is_file()}
    masks, unmatched = find_masks(place, files, [item.name for item in items if item.is_dir()], IMAGE_SUFFIXES)
    captions = captions_by_stem(files)
    found = []
    for name in sorted(files, key=natural_key):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() not in IMAGE_SUFFIXES or is_mask(name):
            continue
        caption = place / captions[stem] if stem in captions else None
        inside = f"{subfolder}/{name}" if subfolder else name
        found.append(ImageFiles(place / name, inside, caption, repeats, masks.get(name)))
    return found, [path.relative_to(folder).as_posix() for path in unmatched]


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as items:
        return [item for item in items if not item.name.startswith(".")]  # also skips macOS's "._image.png"


def _repeats(subfolder: str) -> int:
    match = re.match(r"([0-9]+)_", subfolder)
    repeats = int(match[1]) if match else 1
    if repeats > MAX_REPEATS:
        raise ValueError(
            f'The subfolder "{subfolder}" asks for {repeats} repeats of its images, more than {MAX_REPEATS}: '
            "rename it so that it starts with a smaller number, or not with a number and an underscore."
        )
    return repeats


def _captioned_image(files: ImageFiles, width: int, height: int, trigger: str) -> CaptionedImage:
    if min(width, height) < MIN_SIDE:
        raise ValueError(
            f"{files.name} is {width} × {height} pixels, too small to learn from: each side must have at least "
            f"{MIN_SIDE}. Replace it with a larger image or take it out of the folder."
        )
    caption = with_trigger(read_caption(files), " ".join(trigger.split()))
    return CaptionedImage(files.path, files.name, caption, width, height, files.repeats, files.mask)
