"""Checks of names that users give for files and folders: portable, and inside the right folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

MAX_NAME_BYTES = 200  # of a file or folder name; drives allow 255, and a number and a suffix are added


def is_inside(folder: str | Path, path: str | Path) -> bool:
    """Return whether a path is strictly inside a folder, also when links are followed."""
    try:
        top, found = os.path.realpath(folder), os.path.realpath(path)
        within = os.path.commonpath((top, found)) == top
    except ValueError:  # a null character in the path, or another drive on Windows
        return False
    return within and os.path.abspath(path) != os.path.abspath(folder)


def check_name(given: str, name: str, where: str) -> None:
    """Check that a name stays inside its folder and can be written on every system.

    Args:
        given: the name as the user wrote it, for the message.
        name: the name with "/" between folders, without a suffix.
        where: the folder for the message, such as "models/loras".

    Raises:
        ValueError: it leads outside, or is no valid file name on some system.
    """
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or re.match(r"[A-Za-z]:", name):
        raise ValueError(f"'{given}' leads outside {where}. Give a name inside it, such as 'styles/ink'.")
    if re.search(r'[<>:"|?*\x00-\x1f]', name) or not all(map(_is_portable, parts)):
        raise ValueError(
            f"'{given}' cannot be a file name on every system. Use letters, digits, '-' and '_', and '/' between"
            " folders, such as 'styles/ink'."
        )


def check_place(given: str, folder: Path, path: Path, where: str) -> None:
    """Check that a path stays inside a folder when links are followed, and that it can be written.

    Args:
        given: the name as the user wrote it, for the message.
        folder: in which the path must be.
        path: of the file or folder to write.
        where: the folder for the message, such as "models/loras".

    Raises:
        ValueError: it leads outside, or cannot be written.
    """
    if not is_inside(folder, path):
        raise ValueError(f"'{given}' leads outside {where} through a link. Choose another folder.")
    existing = next(parent for parent in path.parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"'{given}' cannot be saved: {existing.name} is not a writable folder. Choose another name.")


def _is_portable(part: str) -> bool:
    # Windows reserves some names for devices, with any suffix.
    reserved = re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", part, flags=re.IGNORECASE)
    return part != "" and part == part.strip(". ") and len(part.encode()) <= MAX_NAME_BYTES and not reserved
