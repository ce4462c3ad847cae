"""A folder of pictures becomes captioned pictures in a few sizes (buckets), ready for an autoencoder."""

from __future__ import annotations

import hashlib
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .mask_files import find_masks, is_mask, is_mask_folder
from .pixels import read_mask, read_rgb, upright_size

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
CAPTION_SUFFIXES = (".txt", ".caption")  # the first that exists is read
MIN_SIDE = 32  # pixels; below this there is nothing to learn from
_SAME_SHAPE = 0.03  # of a picture and its mask: how far their ratios of sides may be apart
MAX_REPEATS = 1000  # a folder named "2024_spring" is a date, not 2024 repeats


@dataclass(frozen=True)
class Picture:
    path: Path  # the file
    name: str  # its path inside the scanned folder, with "/"
    caption: str  # may be empty when there is no trigger word either
    width: int  # in pixels, after EXIF rotation
    height: int
    repeats: int = 1  # how often it counts in an epoch, from a subfolder named N_name
    mask: Path | None = None  # the file that says what of it is learned

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height


@dataclass(frozen=True)
class Scan:
    pictures: tuple[Picture, ...]  # in natural order: the folder itself, then its subfolders
    problems: tuple[str, ...]  # a sentence for each picture that was left out
    spare_masks: tuple[str, ...] = ()  # names of masks without a picture


@dataclass(frozen=True)
class _Entry:
    path: Path
    name: str
    caption: Path | None
    repeats: int
    mask: Path | None = None


def scan(folder: Path, trigger: str = "", without: Path | None = None) -> Scan:
    """Read the captions and the headers of the pictures in a folder and in its direct subfolders.

    A subfolder "N_name" counts N times, any other once; names that start with a dot are skipped. A picture that cannot
    be read is left out and named in `problems`. A caption is text beside the picture (same stem, .txt or .caption); a
    missing or empty one becomes `trigger`, one without the trigger gets it in front. A mask is no picture: it belongs
    to one, as mask_files says. without: a subfolder that is left out.

    Raises ValueError naming the files: nothing to read, a caption that is not UTF-8, a side under MIN_SIDE pixels.
    """
    entries, spare = _entries(folder, without)
    if not entries:
        kinds = ", ".join(sorted(PICTURE_SUFFIXES))
        raise ValueError(f'The folder "{folder.name}" has no pictures: put some in ({kinds}) or choose another folder.')
    pictures: list[Picture] = []
    problems: list[str] = []
    faults: list[str] = []
    for entry in entries:
        try:
            width, height = upright_size(entry.path, entry.name)
        except ValueError as error:
            problems.append(str(error))
            continue
        try:
            pictures.append(_picture(entry, width, height, trigger))
        except ValueError as error:
            faults.append(str(error))
    if faults:
        more = f"\n(and {len(faults) - 5} more)" if len(faults) > 5 else ""
        raise ValueError("\n".join(faults[:5]) + more)
    if not pictures:
        raise ValueError(f'None of the {len(entries)} pictures in "{folder.name}" can be used. {problems[0]}')
    return Scan(tuple(pictures), tuple(problems), tuple(spare))


def fingerprint(folder: Path) -> str:
    """A hash of the names, sizes and times of all files that `scan` would read, masks too. Opens none of them."""
    digest = hashlib.sha256()
    for entry in _entries(folder)[0]:
        for path in filter(None, (entry.path, entry.caption, entry.mask)):
            status = path.stat()
            digest.update(f"{entry.name}\0{path.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def enlargement(picture: Picture, bucket: tuple[int, int]) -> float:
    """The factor by which `load` scales a picture to cover the bucket; above 1 it is drawn larger than it is."""
    return max(bucket[0] / picture.width, bucket[1] / picture.height)


def cropped_share(picture: Picture, bucket: tuple[int, int]) -> float:
    """The share of the picture's area, 0 to 1, that `load` cuts off to fit the bucket."""
    scale = enlargement(picture, bucket)
    return 1.0 - (bucket[0] * bucket[1]) / (picture.width * picture.height * scale * scale)


def load(picture: Picture, bucket: tuple[int, int]) -> Tensor:
    """The picture as float32 (height, width, 3) in 0..1, upright, on white, scaled to cover the bucket and cropped.

    Raises ValueError naming the file when its content is broken.
    """
    fitted = read_rgb(picture.path, picture.name, bucket)
    return torch.from_numpy(np.asarray(fitted, dtype=np.float32) / 255.0)


def load_mask(picture: Picture, bucket: tuple[int, int], alpha: bool = False) -> Tensor | None:
    """What of a picture is learned, float32 (height, width) in 0..1, cropped and scaled as `load` does; None: all.

    alpha: a picture without a mask of its own has what is not transparent in it.

    Raises ValueError naming the picture when its mask is broken or has another shape.
    """
    if picture.mask is None:
        found = read_mask(picture.path, picture.name, bucket, alpha=True) if alpha else None
    else:
        found = _mask_from_file(picture, picture.mask, bucket)
    return None if found is None else torch.from_numpy(np.asarray(found, dtype=np.float32) / 255.0)


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sorts img2 before img10, without regard to case; the name itself breaks ties."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def _mask_from_file(picture: Picture, mask: Path, bucket: tuple[int, int]) -> Image.Image | None:
    try:
        width, height = upright_size(mask, mask.name)
        found = read_mask(mask, mask.name, bucket)
    except ValueError as error:
        raise ValueError(
            f"The mask {mask.name} of {picture.name} cannot be read as a picture. Save it anew as PNG, or take it away."
        ) from error
    if abs(math.log(width / height * picture.height / picture.width)) > _SAME_SHAPE:
        raise ValueError(
            f"The mask of {picture.name} is {width} × {height} pixels, but the picture {picture.width} × "
            f"{picture.height}. Give it the same shape, so that it lies on the picture."
        )
    return found


def _entries(folder: Path, without: Path | None = None) -> tuple[list[_Entry], list[str]]:
    """All pictures of a folder, then of its direct subfolders, in natural order, each with its caption file and mask.

    Also the names of masks that belong to none of them.
    """
    entries: list[_Entry] = []
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
            masks, left = find_masks(folder / prefix, files, inner, PICTURE_SUFFIXES)
            spare += [path.relative_to(folder).as_posix() for path in left]
            captions = _captions(files)
            for name in sorted(files, key=natural_key):
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in PICTURE_SUFFIXES and not is_mask(name):
                    caption = folder / prefix / captions[stem] if stem in captions else None
                    inside = f"{prefix}/{name}" if prefix else name
                    entries.append(_Entry(folder / prefix / name, inside, caption, repeats, masks.get(name)))
    except OSError as error:
        raise ValueError(f'The folder "{folder.name}" cannot be read: {error.strerror}.') from error
    return entries, spare


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as items:
        return [item for item in items if not item.name.startswith(".")]  # also skips macOS's "._picture.png"


def _captions(files: set[str]) -> dict[str, str]:
    """Stem -> name of the caption file, .txt before .caption."""
    found: dict[str, str] = {}
    for wanted in CAPTION_SUFFIXES:
        for name in sorted(files):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() == wanted:
                found.setdefault(stem, name)
    return found


def _repeats(subfolder: str) -> int:
    match = re.match(r"([0-9]+)_", subfolder)
    repeats = int(match[1]) if match else 1
    if repeats > MAX_REPEATS:
        raise ValueError(
            f'The subfolder "{subfolder}" asks for {repeats} repeats of its pictures, more than {MAX_REPEATS}: '
            "rename it so that it does not start with a number and an underscore, or with a smaller number."
        )
    return repeats


def _picture(entry: _Entry, width: int, height: int, trigger: str) -> Picture:
    if min(width, height) < MIN_SIDE:
        raise ValueError(
            f"{entry.name} is {width} × {height} pixels, too small to learn from: each side must have at least "
            f"{MIN_SIDE}. Replace it with a larger picture or take it out of the folder."
        )
    caption = _with_trigger(_read_caption(entry), " ".join(trigger.split()))
    return Picture(entry.path, entry.name, caption, width, height, entry.repeats, entry.mask)


def _read_caption(entry: _Entry) -> str:
    if entry.caption is None:
        return ""
    try:
        text = entry.caption.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"The caption of {entry.name} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(entry)) from error
    if "\0" in text:  # UTF-16 without a mark at its start decodes, but with a zero after each letter
        raise ValueError(_not_utf8(entry))
    return " ".join(text.split())


def _not_utf8(entry: _Entry) -> str:
    name = entry.caption.name if entry.caption else ""
    return f"The caption {name} of {entry.name} is not UTF-8 text: open it in an editor and save it again as UTF-8."


def _with_trigger(caption: str, trigger: str) -> str:
    if not caption or not trigger:
        return caption or trigger
    if re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{trigger}, {caption}"
