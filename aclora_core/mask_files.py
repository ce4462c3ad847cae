"""Where the mask of a picture lies, after the customs of other trainers, and which files are masks and no pictures.

OneTrainer puts rocket-masklabel.png beside rocket.png. kohya's scripts, ai-toolkit and diffusion-pipe take a folder of
masks with the pictures' own names; here it is the subfolder "masks" (or "mask") of the folder that the pictures are in.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path

ENDING = "-masklabel"
FOLDERS = frozenset({"masks", "mask"})


def is_mask_folder(name: str) -> bool:
    """Whether a subfolder holds masks."""
    return name.casefold() in FOLDERS


def is_mask(name: str) -> bool:
    """Whether a file beside pictures is a mask."""
    return os.path.splitext(name)[0].casefold().endswith(ENDING)


def find_masks(
    folder: Path, files: Iterable[str], subfolders: Iterable[str], suffixes: Collection[str]
) -> tuple[dict[str, Path], list[Path]]:
    """The mask of each picture of a folder that has one, by the picture's file name, and masks without a picture.

    A file beside the picture goes before one in a subfolder, and there the very same name before another ending.
    suffixes: of files that are pictures, in small letters. Raises OSError when a folder cannot be read.
    """
    named = [name for name in files if _is_picture(name, suffixes)]
    beside = [folder / name for name in sorted(named) if is_mask(name)]
    inside = [
        folder / subfolder / name
        for subfolder in sorted(filter(is_mask_folder, subfolders))
        for name in sorted(os.listdir(folder / subfolder))
        if _is_picture(name, suffixes)
    ]
    of_stem = {_stem(path.name): path for path in reversed(beside)}
    of_name = {path.name: path for path in reversed(inside)}
    of_stem_inside = {_stem(path.name): path for path in reversed(inside)}
    masks = {}
    for name in named:
        found = of_stem.get(_stem(name)) or of_name.get(name) or of_stem_inside.get(_stem(name))
        if found and not is_mask(name):
            masks[name] = found
    return masks, [path for path in [*beside, *inside] if path not in masks.values()]


def _is_picture(name: str, suffixes: Collection[str]) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes


def _stem(name: str) -> str:
    """Of a picture or its mask, without the mask's ending."""
    stem = os.path.splitext(name)[0]
    return stem[: -len(ENDING)] if is_mask(name) else stem
