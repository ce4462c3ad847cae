"""Checks of names that users give for files and folders: portable, and inside the folder they belong to."""

from __future__ import annotations

import os
import re
from pathlib import Path

import folder_paths

MAX_NAME_BYTES = 200  # of a part of a name; drives allow 255, and a number and an ending are added


def check_name(given: str, name: str, where: str) -> None:
    """Check that a name stays inside its folder and can be written on every system.

    Args:
        given: the name as the user wrote it, for the message.
        name: the name with "/" between folders, without an ending.
        where: the folder for the message, such as "models/loras".

    Raises:
        ValueError: it leads outside, or some system cannot write it.
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
    """Check that a path stays inside a folder when links are followed, and can be written to.

    Args:
        given: the name as the user wrote it, for the message.
        where: the folder for the message, such as "models/loras".

    Raises:
        ValueError: it leads outside, or cannot be written to.
    """
    if not folder_paths.is_within_directory(str(folder), str(path)):
        raise ValueError(f"'{given}' leads outside {where} through a link. Choose another folder.")
    existing = next(parent for parent in path.parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"'{given}' cannot be saved: {existing.name} is no folder that can be written to.")


def _is_portable(part: str) -> bool:
    # Windows reserves some names for devices, with any ending.
    reserved = re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", part, flags=re.IGNORECASE)
    return part != "" and part == part.strip(". ") and len(part.encode()) <= MAX_NAME_BYTES and not reserved
