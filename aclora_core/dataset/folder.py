"""Scanning a folder: which images it holds, with their captions, masks and repeats."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from .captions import CaptionLines, ImageFiles, read_captions
from .finding import find_images
from .image import CaptionedImage, Scan
from .opening import ImageHeader, read_header
from .tags import with_trigger

MIN_SIDE = 32  # pixels; smaller images show nothing to learn from
_SHOWN_ERRORS = 5


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
    found = find_images(folder, without, allowed)
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
            images.append(captioned_image(files, header, trigger, lines))
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
    for files in find_images(folder, allowed=allowed).images:
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


def captioned_image(files: ImageFiles, header: ImageHeader, trigger: str, lines: CaptionLines) -> CaptionedImage:
    """Return an image with its captions. Raises ValueError if it is too small, or its captions cannot be used."""
    width, height, moving = header
    if min(width, height) < MIN_SIDE:
        raise ValueError(
            f"{files.name} is {width} × {height} pixels, too small to learn from: each side must have at least "
            f"{MIN_SIDE}. Replace it with a larger image or move it out of the folder."
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
