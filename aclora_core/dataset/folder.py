"""A folder of pictures becomes captioned pictures in a few sizes (buckets), ready for an autoencoder."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from .captions import ImageFiles, captions_by_stem, read_caption, with_trigger
from .decoding import upright_size
from .image import CaptionedImage, Scan
from .masks import find_masks, is_mask, is_mask_folder

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})


MIN_SIDE = 32  # pixels; below this there is nothing to learn from


MAX_REPEATS = 1000  # a folder named "2024_spring" is a date, not 2024 repeats


def scan_folder(folder: Path, trigger: str = "", without: Path | None = None) -> Scan:
    """Read the captions and the headers of the pictures in a folder and in its direct subfolders.

    A subfolder "N_name" counts N times, any other once; names that start with a dot are skipped. A picture that cannot
    be read is left out and named in `problems`. A caption is text beside the picture (same stem, .txt or .caption); a
    missing or empty one becomes `trigger`, one without the trigger gets it in front. A mask is no picture: it belongs
    to one, as mask_files says. without: a subfolder that is left out.

    Raises ValueError naming the files: nothing to read, a caption that is not UTF-8, a side under MIN_SIDE pixels.
    """
    entries, spare = _entries(folder, without)
    if not entries:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(f'The folder "{folder.name}" has no pictures: put some in ({kinds}) or choose another folder.')
    pictures: list[CaptionedImage] = []
    problems: list[str] = []
    faults: list[str] = []
    for entry in entries:
        try:
            width, height = upright_size(entry.path, entry.name)
        except ValueError as error:
            problems.append(str(error))
            continue
        try:
            pictures.append(_captioned_image(entry, width, height, trigger))
        except ValueError as error:
            faults.append(str(error))
    if faults:
        more = f"\n(and {len(faults) - 5} more)" if len(faults) > 5 else ""
        raise ValueError("\n".join(faults[:5]) + more)
    if not pictures:
        raise ValueError(f'None of the {len(entries)} pictures in "{folder.name}" can be used. {problems[0]}')
    return Scan(tuple(pictures), tuple(problems), tuple(spare))


def folder_fingerprint(folder: Path) -> str:
    """A hash of the names, sizes and times of all files that `scan` would read, masks too. Opens none of them."""
    digest = hashlib.sha256()
    for entry in _entries(folder)[0]:
        for path in filter(None, (entry.path, entry.caption, entry.mask)):
            status = path.stat()
            digest.update(f"{entry.name}\0{path.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sorts img2 before img10, without regard to case; the name itself breaks ties."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def _entries(folder: Path, without: Path | None = None) -> tuple[list[ImageFiles], list[str]]:
    """All pictures of a folder, then of its direct subfolders, in natural order, each with its caption file and mask.

    Also the names of masks that belong to none of them.
    """
    entries: list[ImageFiles] = []
    spare: list[str] = []
    try:
        subfolders = sorted((item.name for item in _visible(folder) if item.is_dir()), key=natural_key)
        for prefix in ("", *subfolders):
            repeats = _repeats(prefix)
            if repeats == 0 or is_mask_folder(prefix) or folder / prefix == without:
                continue
            items = _visible(folder / prefix)
            files = {item.name for item in items if item.is_file()}
            inner = [item.name for item in items if item.is_dir()]
            masks, left = find_masks(folder / prefix, files, inner, IMAGE_SUFFIXES)
            spare += [path.relative_to(folder).as_posix() for path in left]
            captions = captions_by_stem(files)
            for name in sorted(files, key=natural_key):
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in IMAGE_SUFFIXES and not is_mask(name):
                    caption = folder / prefix / captions[stem] if stem in captions else None
                    inside = f"{prefix}/{name}" if prefix else name
                    entries.append(ImageFiles(folder / prefix / name, inside, caption, repeats, masks.get(name)))
    except OSError as error:
        raise ValueError(f'The folder "{folder.name}" cannot be read: {error.strerror}.') from error
    return entries, spare


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as items:
        return [item for item in items if not item.name.startswith(".")]  # also skips macOS's "._picture.png"


def _repeats(subfolder: str) -> int:
    match = re.match(r"([0-9]+)_", subfolder)
    repeats = int(match[1]) if match else 1
    if repeats > MAX_REPEATS:
        raise ValueError(
            f'The subfolder "{subfolder}" asks for {repeats} repeats of its pictures, more than {MAX_REPEATS}: '
            "rename it so that it does not start with a number and an underscore, or with a smaller number."
        )
    return repeats


def _captioned_image(entry: ImageFiles, width: int, height: int, trigger: str) -> CaptionedImage:
    if min(width, height) < MIN_SIDE:
        raise ValueError(
            f"{entry.name} is {width} × {height} pixels, too small to learn from: each side must have at least "
            f"{MIN_SIDE}. Replace it with a larger picture or take it out of the folder."
        )
    caption = with_trigger(read_caption(entry), " ".join(trigger.split()))
    return CaptionedImage(entry.path, entry.name, caption, width, height, entry.repeats, entry.mask)
