"""Scanning a folder: which images it holds, with their captions, masks and repeats."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .captions import CAPTION_SUFFIXES, CaptionLines, ImageFiles, match_captions, read_captions
from .image import CaptionedImage, Scan
from .listing import Listing, Unused, inside_name, list_folder, list_subfolder, real_paths
from .masks import find_masks, is_mask, is_mask_folder
from .opening import ImageHeader, read_header
from .tags import with_trigger

_JPEG_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".mpo"}
_MODERN_SUFFIXES = {".webp", ".avif", ".avifs", ".heic", ".heif", ".hif", ".jxl"}
# These are tried, and their content decides. Those that need a plugin are named if it is not installed.
IMAGE_SUFFIXES = frozenset(
    _JPEG_SUFFIXES | _MODERN_SUFFIXES | {".png", ".apng", ".bmp", ".dib", ".gif", ".tif", ".tiff"}
)
MIN_SIDE = 32  # pixels; smaller images show nothing to learn from
MAX_REPEATS = 1000  # a folder named "2024_spring" is a date, not 2024 repeats
_SHOWN_ERRORS = 5
_COMPANIONS = frozenset({"readme", "license", "licence", "copying"})  # texts about a dataset, which nobody misses in it


def scan_folder(
    folder: Path,
    trigger: str = "",
    without: Path | None = None,
    lines: CaptionLines = "one per epoch",
    allowed: Sequence[Path] = (),
) -> Scan:
    """Read the captions and the image headers of a folder and of its direct subfolders.

    A subfolder "N_name" counts N times, any other once; names that start with a dot are skipped. An image that cannot
    be read is skipped and named in `problems`. The caption is a text file beside the image, found by
    match_captions. Masks are not images; find_masks says which image each belongs to. What else lies there is named in
    `unused`.

    Args:
        folder: the folder.
        trigger: the word put in front of captions that lack it; it also stands for missing and empty captions.
        without: a subfolder to leave out.
        lines: what the lines of a caption file are.
        allowed: folders into which links may lead; anywhere if there are none.

    Raises:
        ValueError: there is no usable image, a caption is not UTF-8 or too long, or a side is shorter than MIN_SIDE
            pixels; the message names the files.
    """
    found = _find_images(folder, without, allowed)
    unused = found.unused.sentences()
    if not found.images:
        advice = "add some (PNG, JPEG, WebP and others) or choose another folder."
        raise ValueError("\n".join([f'The folder "{folder.name}" has no images: {advice}', *unused]))
    images: list[CaptionedImage] = []
    problems: list[str] = []
    errors: list[str] = []
    for files in found.images:
        try:
            header = read_header(files.path, files.name)
        except ValueError as error:
            problems.append(str(error))
            continue
        try:
            images.append(_captioned_image(files, header, trigger, lines))
        except ValueError as error:
            errors.append(str(error))
    if errors:
        more = len(errors) - _SHOWN_ERRORS
        raise ValueError("\n".join(errors[:_SHOWN_ERRORS]) + (f"\n(and {more} more)" if more > 0 else ""))
    if not images:
        raise ValueError(f'None of the {len(found.images)} images in "{folder.name}" can be used. {problems[0]}')
    return Scan(tuple(images), tuple(problems), tuple(found.unmatched_masks), unused)


def folder_fingerprint(folder: Path, allowed: Sequence[Path] = ()) -> str:
    """Hash the names, sizes and modification times of all files that `scan_folder` would read; opens none of them."""
    digest = hashlib.sha256()
    for files in _find_images(folder, allowed=allowed).images:
        for path in (files.path, files.caption, files.mask):
            if path is not None:
                digest.update(f"{files.name}\0{path.name}\0{_state(path)}\n".encode())
    return digest.hexdigest()


def _state(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:  # deleted meanwhile
        return "missing"
    return f"{status.st_size}\0{status.st_mtime_ns}"


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


@dataclass
class _Found:
    """What the names in a folder and its direct subfolders say."""

    images: list[ImageFiles] = field(default_factory=list)  # in natural order: the folder itself, then its subfolders
    unmatched_masks: list[str] = field(default_factory=list)
    unused: Unused = field(default_factory=Unused)


def _find_images(folder: Path, without: Path | None = None, allowed: Sequence[Path] = ()) -> _Found:
    """Find the images of a folder and of its direct subfolders, and name what is not used."""
    found, roots = _Found(), real_paths(allowed)
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


def _add_images(
    found: _Found, folder: Path, subfolder: str, listing: Listing, roots: Sequence[str], repeats: int
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
        is_companion = os.path.splitext(name)[0].lower() in _COMPANIONS
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


def _captioned_image(files: ImageFiles, header: ImageHeader, trigger: str, lines: CaptionLines) -> CaptionedImage:
    width, height, moving = header
    if min(width, height) < MIN_SIDE:
        raise ValueError(
            f"{files.name} is {width} × {height} pixels, too small to learn from: each side must have at least "
            f"{MIN_SIDE}. Replace it with a larger image or take it out of the folder."
        )
    written = read_captions(files, lines)
    caption, *others = [with_trigger(each, trigger) for each in written or ("",)]
    return CaptionedImage(
        files.path,
        files.name,
        caption,
        width,
        height,
        files.repeats,
        files.mask,
        tuple(others),
        bool(written),
        moving,
    )
