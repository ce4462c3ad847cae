"""What lies in a folder: its files and subfolders, and what of it cannot be used, with the reason."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..text import name_list

Reason = Literal["kind", "caption", "depth", "dead link", "outside", "access", "name"]

# Files that systems and programs leave in folders, in lower case; names that start with a dot are such files too.
_SYSTEM_FILES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "icon\r"})
_SHOWN_NAMES = 5
_SENTENCES: dict[Reason, tuple[str, str]] = {  # what stands before the names and what behind them
    "kind": ("Not used, as neither images nor captions", ""),
    "caption": ("Captions without an image, not used", ""),
    "depth": ("Folders deeper than one level, not read", " Move their images up."),
    "dead link": ("Links that lead nowhere, not used", ""),
    "outside": ("Links out of the allowed folders, not used", " Copy what they lead to into the folder."),
    "access": ("Not used, since they may not be read", " Change their permissions."),
    "name": ("Names that are not valid text, not used", " Rename them."),
}


class Unused:
    """Names of what is not used, by reason."""

    def __init__(self) -> None:
        self._names: dict[Reason, list[str]] = {}

    def add(self, reason: Reason, name: str) -> None:
        """Add a file or folder by its path inside the scanned folder."""
        self._names.setdefault(reason, []).append(printable(name))

    def sentences(self) -> tuple[str, ...]:
        """Return a sentence for each reason, with the first names."""
        lines = []
        for reason, (before, behind) in _SENTENCES.items():
            names = self._names.get(reason)
            if names:
                lines.append(f"{before}: {name_list(sorted(names), _SHOWN_NAMES)}.{behind}")
        return tuple(lines)


@dataclass
class Listing:
    """The files and the subfolders of a folder that can be used, by name."""

    files: set[str] = field(default_factory=set)
    folders: list[str] = field(default_factory=list)


def list_folder(folder: Path, inside: str, roots: Sequence[str], unused: Unused) -> Listing:
    """List a folder, without names that start with a dot.

    Args:
        folder: the folder.
        inside: its path inside the scanned folder, with "/"; empty for that folder itself.
        roots: real paths of the folders into which links may lead; anywhere if there are none.
        unused: receives what cannot be used.

    Raises:
        OSError: the folder cannot be read.
    """
    listing = Listing()
    with os.scandir(folder) as items:
        for item in items:
            if item.name.startswith(".") or item.name.casefold() in _SYSTEM_FILES:
                continue
            kind = _kind(item, roots)
            if kind == "file":
                listing.files.add(item.name)
            elif kind == "folder":
                listing.folders.append(item.name)
            else:
                unused.add(kind, inside_name(inside, item.name))
    return listing


def list_subfolder(folder: Path, inside: str, roots: Sequence[str], unused: Unused) -> Listing:
    """List a folder as `list_folder` does; one that cannot be read is empty and unused."""
    try:
        return list_folder(folder, inside, roots, unused)
    except OSError:
        unused.add("access", f"{inside}/")
        return Listing()


def real_paths(folders: Iterable[Path]) -> list[str]:
    """Return the paths of folders without links, in the form that is compared."""
    return [os.path.normcase(os.path.realpath(folder)) for folder in folders]


def inside_name(inside: str, name: str) -> str:
    """Return a path inside the scanned folder, with "/"."""
    return f"{inside}/{name}" if inside else name


def printable(name: str) -> str:
    """Return a name that can be shown and sent; what is not valid text in it becomes "?"."""
    return name.encode("utf-8", "replace").decode("utf-8")


def _kind(item: os.DirEntry[str], roots: Sequence[str]) -> Literal["file", "folder"] | Reason:
    if printable(item.name) != item.name:
        return "name"
    try:
        is_folder, is_file = item.is_dir(), item.is_file()
    except PermissionError:
        return "access"
    except OSError:  # a link to itself
        return "dead link"
    if item.is_symlink() and not (is_folder or is_file or os.path.exists(item.path)):
        return "dead link"
    # On Windows a folder may be a junction, which is_symlink does not know.
    if (item.is_symlink() or is_folder) and roots and not is_below(item.path, roots):
        return "outside"
    if is_folder:
        return "folder"
    return "file" if is_file else "kind"  # devices and pipes are neither


def is_below(path: str, roots: Sequence[str]) -> bool:
    """Return whether a path is one of the folders or lies below one, also when links are followed.

    Args:
        path: of a file or folder.
        roots: of `real_paths`.
    """
    (real,) = real_paths([Path(path)])
    return any(real == root or real.startswith(root.rstrip(os.sep) + os.sep) for root in roots)
