"""Checks of names that users give for files and folders: portable, and inside the right folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

MAX_NAME_BYTES = 200  # of a file or folder name; drives allow 255, and a number and a suffix are added
MAX_PATH_BYTES = 1000  # of all names together; systems allow 4,096 and less, with the folder in front
_SHOWN = 80  # characters of a name in a message
_DEVICE = r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3])"  # on Windows, with any suffix


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
        raise ValueError(f"'{shown(given)}' leads outside {where}. Give a name inside it, such as 'styles/ink'.")
    reason = next(filter(None, map(_problem, parts)), "")
    if not reason and len(name.encode()) > MAX_PATH_BYTES:
        reason = f"with its folders it is longer than {MAX_PATH_BYTES} bytes"
    if reason:
        raise ValueError(
            f"'{shown(given)}' cannot be a file name on every system: {reason}. Use letters, digits, '-' and '_', and "
            "'/' between folders, such as 'styles/ink'."
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
        raise ValueError(f"'{shown(given)}' leads outside {where} through a link. Choose another folder.")
    try:
        existing = next(parent for parent in path.parents if parent.exists())
        writable = existing.is_dir() and os.access(existing, os.W_OK)
    except OSError as error:
        raise ValueError(
            f"'{shown(given)}' cannot be saved: {error.strerror or error}. Choose another name."
        ) from error
    if not writable:
        raise ValueError(
            f"'{shown(given)}' cannot be saved: {existing.name} is not a writable folder. Choose another name."
        )


def shown(given: object) -> str:
    """Return a name as messages show it: shortened, and without characters that cannot be printed."""
    text = str(given).encode("utf-8", "backslashreplace").decode()
    text = "".join(character if character.isprintable() else repr(character)[1:-1] for character in text[: _SHOWN + 1])
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _problem(part: str) -> str:
    """Return why a file or folder name cannot be used on some system; "" if it can."""
    if forbidden := re.search(r'[<>:"|?*\x00-\x1f\x7f]', part):
        return f"it has the character {forbidden[0]!r}"
    if part == "" or part != part.strip(". "):
        return "a name in it is empty, or begins or ends with a full stop or a space"
    if len(part.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
        return f"it is longer than {MAX_NAME_BYTES} bytes"
    if re.fullmatch(rf"{_DEVICE}\s*(\..*)?", part, flags=re.IGNORECASE | re.DOTALL):
        return f"'{shown(part)}' is the name of a device on Windows"
    if any("\ud800" <= letter <= "\udfff" for letter in part):
        return "it has half of a character (a lone surrogate)"
    return ""
