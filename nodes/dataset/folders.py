"""The folders that a dataset may come from; paths outside them are refused."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from ...aclora_core.dataset import natural_key
from ..paths import is_inside, shown

EXAMPLES = Path(__file__).resolve().parents[2] / "workflows" / "example_pictures"
# Prefixes in the list of folders that are not in ComfyUI's input folder.
DATASETS = "datasets: "
OUTPUT = "output: "  # of what ComfyUI's Save Image-Text (to Folder) wrote, where its folder_name is datasets/NAME
EXAMPLE = "example: "
MAX_DEPTH = 3  # levels below a root; object_info requests have to stay fast


def dataset_folders() -> list[str]:
    """Return the names of all selectable folders: in the input folder, in "datasets" folders, and the examples."""
    names: dict[str, None] = {}
    for prefix, roots in _roots().items():
        for root in roots:
            for name in _subfolders(root):
                names[prefix + name] = None
    return list(names)


def first_example(folders: list[str]) -> str | None:
    """Return the first example in the list, a good default for new users; None if there is none."""
    return next((name for name in folders if name.startswith(EXAMPLE)), None)


def allowed_folders() -> list[Path]:
    """Return the folders below which every file of a dataset must lie, also when links are followed."""
    return [Path(root) for roots in _roots().values() for root in roots]


def writable_folders() -> list[Path]:
    """Return the folders below which captions may be written: all but those of the pack itself."""
    return [Path(root) for prefix, roots in _roots().items() if prefix != EXAMPLE for root in roots]


def is_editable(folder: str) -> bool:
    """Return whether captions in a folder from the list may be written."""
    return not folder.startswith(EXAMPLE)


def resolve_folder(folder: str) -> Path:
    """Return the path of a folder from the list.

    Raises:
        ValueError: none is chosen, it leads outside the allowed folders, or it does not exist.
    """
    if not isinstance(folder, str):  # programs can send any value for a drop-down
        raise ValueError("No folder is chosen. Choose one from the list.")
    prefix = next((mark for mark in (DATASETS, OUTPUT, EXAMPLE) if folder.startswith(mark)), "")
    name = folder[len(prefix) :]
    for root in _roots()[prefix]:
        target = os.path.abspath(os.path.join(root, name))
        if not is_inside(root, target):
            raise ValueError(
                f'The folder "{shown(folder)}" leads outside the allowed folders. Choose one from the list, or '
                "register the folder above it as datasets in extra_model_paths.yaml."
            )
        if os.path.isdir(target):
            return Path(target)
    raise ValueError(
        f'The folder "{shown(folder)}" does not exist. Choose one from the list, or create it in the input folder of '
        "ComfyUI and press R."
    )


def _roots() -> dict[str, list[str]]:
    """Map each prefix in the list to the folders whose subfolders it marks."""
    registered, _ = folder_paths.folder_names_and_paths.get("datasets", ([], set()))
    return {
        "": [folder_paths.get_input_directory()],
        DATASETS: list(registered),
        OUTPUT: [os.path.join(folder_paths.get_output_directory(), "datasets")],
        EXAMPLE: [str(EXAMPLES)],
    }


def _subfolders(root: str, inside: str = "", depth: int = MAX_DEPTH) -> list[str]:
    """Paths relative to root, with "/", of the folders down to `depth`; links that lead outside are skipped."""
    found: list[str] = []
    try:
        with os.scandir(os.path.join(root, inside)) as items:
            names = [item.name for item in items if _is_selectable(root, item)]
    except OSError:  # missing or unreadable: nothing to choose from, and no reason to fail the whole list
        return found
    for name in sorted(names, key=natural_key):
        found.append(f"{inside}/{name}" if inside else name)
        if depth > 1:
            found += _subfolders(root, found[-1], depth - 1)
    return found


def _is_selectable(root: str, item: os.DirEntry[str]) -> bool:
    try:
        item.name.encode()
        if item.name.startswith(".") or not item.is_dir():
            return False
    except (OSError, UnicodeEncodeError):  # a link to itself, or a name that is not valid text
        return False
    # Following links takes most of the time, so it is left to what may be one; on Windows a plain folder may be.
    return is_inside(root, item.path) if item.is_symlink() or os.name == "nt" else True
