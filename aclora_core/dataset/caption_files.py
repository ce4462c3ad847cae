"""Editing captions: the text beside an image as it is in its file, and how a new one is saved.

A new text replaces the file at once or not at all. What the file held before is kept beside it under the same name with
".bak" behind it, by the first save; later ones leave that file alone, so that it stays what its author wrote.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..storage import write_atomically
from .captions import CAPTION_SUFFIXES, MAX_FILE_SIZE, ImageFiles, decode, read_bounded, split_captions
from .listing import is_below, real_paths

BACKUP = ".bak"  # behind the name of a caption file: what it held before it was first edited
_SAVING = threading.Lock()  # from the look at a file until it is written


class CaptionChangedError(ValueError):
    """A caption file is not as it was when it was shown."""


@dataclass(frozen=True)
class CaptionText:
    """What a caption file holds."""

    text: str = ""  # without a byte order mark and white space at its end; empty if it cannot be read
    version: str = ""  # differs with every other content; empty if there is no file
    problem: str = ""  # why it cannot be read


def is_backup(name: str) -> bool:
    """Return whether a file is what a caption was before it was edited."""
    stem, suffix = os.path.splitext(name)
    return suffix.lower() == BACKUP and os.path.splitext(stem)[1].lower() in CAPTION_SUFFIXES


def read_caption(files: ImageFiles) -> CaptionText:
    """Return what the caption file of an image holds, also where it cannot be read as text."""
    if files.caption is None:
        return CaptionText()
    version = _version(files.caption)
    try:
        text = decode(read_bounded(files.name, files.caption), files.name, files.caption.name)
    except ValueError as error:
        return CaptionText(version=version, problem=str(error))
    return CaptionText(text.rstrip(), version)


def save_caption(files: ImageFiles, text: str, version: str, folders: Sequence[Path]) -> CaptionText:
    """Write the caption of an image as UTF-8, into its file or a new one beside it (rocket.txt for rocket.png).

    Args:
        files: of the image.
        text: the new caption, or several on lines of their own; may be empty.
        version: of the file as it was shown; empty if there was none.
        folders: below which the file must lie, also when links are followed.

    Returns:
        What the file holds now.

    Raises:
        CaptionChangedError: the file has changed since it was shown.
        ValueError: the text cannot be a caption, or the file cannot be written.
    """
    path = files.caption or files.path.with_suffix(CAPTION_SUFFIXES[0])
    data = _encoded(text, files.name, path.name)
    target = Path(os.path.realpath(path))
    if not is_below(str(target), real_paths(folders)):
        raise ValueError(
            f"{path.name} cannot be changed: it is a link that leads outside the dataset folders. Edit it there."
        )
    with _SAVING:
        if _version(target) != version or (files.caption is None and os.path.lexists(path)):
            raise CaptionChangedError(
                f"{path.name} has changed since it was shown here, so it was not overwritten. Press Reload and write "
                "your caption again."
            )
        try:
            _keep(target)
            write_atomically(target, [data])
        except OSError as error:
            raise ValueError(error.strerror or f"{path.name} cannot be saved: {error}.") from error
        return CaptionText(data.decode().rstrip(), _version(target))


def _encoded(text: str, image: str, caption: str) -> bytes:
    written = "\n".join(text.splitlines()).rstrip()
    try:
        data = f"{written}\n".encode() if written else b""
    except UnicodeEncodeError as error:
        raise ValueError(f"The caption of {image} holds half of a character. Write it again.") from error
    if "\0" in written:
        raise ValueError(f"The caption of {image} holds an invalid character. Write it again.")
    if len(data) > MAX_FILE_SIZE:
        raise ValueError(f"The caption of {image} is larger than {MAX_FILE_SIZE >> 10} KB. Shorten it.")
    split_captions(written, image, caption)
    return data


def _keep(path: Path) -> None:
    """Copy a file that is about to be replaced for the first time."""
    backup = path.with_name(path.name + BACKUP)
    if path.exists() and not os.path.lexists(backup):
        write_atomically(backup, [path.read_bytes()])


def _version(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return f"{size} {hashlib.sha256(file.read(MAX_FILE_SIZE)).hexdigest()}"
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"unreadable: {error.errno}"
