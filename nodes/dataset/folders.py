"""The folders that a dataset may come from, and nothing outside them."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from ...aclora_core.dataset import natural_key

EXAMPLES = Path(__file__).resolve().parents[2] / "workflows" / "example_pictures"
DATASETS, EXAMPLE = "datasets: ", "example: "  # how the list marks folders that are not in ComfyUI's input
DEPTH = 3  # levels below a root; an object_info request has to stay quick


def dataset_folders() -> list[str]:
    """The names of all folders that can be chosen: subfolders of the input folder, of "datasets", and the examples."""
    names: dict[str, None] = {}
    for prefix, roots in _roots().items():
        for root in roots:
            names.update(dict.fromkeys(prefix + name for name in _subfolders(root, root)))
    return list(names)


def first_example(folders: list[str]) -> str | None:
    """A good choice for a newcomer."""
    return next((name for name in folders if name.startswith(EXAMPLE)), None)


def resolve_folder(folder: str) -> Path:
    """The path of a folder from the list. Raises ValueError when it leads outside or is not there."""
    prefix = next((mark for mark in (DATASETS, EXAMPLE) if folder.startswith(mark)), "")
    name = folder[len(prefix) :]
    for root in _roots()[prefix]:
        target = os.path.abspath(os.path.join(root, name))
        if not folder_paths.is_within_directory(root, target) or target == os.path.abspath(root):
            raise ValueError(
                f'The folder "{folder}" leads outside the allowed folders. Choose one from the list, or register the '
                "folder above it as datasets in extra_model_paths.yaml."
            )
        if os.path.isdir(target):
            return Path(target)
    raise ValueError(
        f'The folder "{folder}" is not there. Choose one from the list, or make it in the input folder of ComfyUI '
        "and press R."
    )


def _roots() -> dict[str, list[str]]:
    """Prefix in the list -> the folders whose subfolders it stands for."""
    registered, _ = folder_paths.folder_names_and_paths.get("datasets", ([], set()))
    return {"": [folder_paths.get_input_directory()], DATASETS: list(registered), EXAMPLE: [str(EXAMPLES)]}


def _subfolders(root: str, folder: str, depth: int = DEPTH) -> list[str]:
    """Paths below root, with "/", of the folders in `folder` down to `depth`; those behind a link to elsewhere not."""
    found: list[str] = []
    try:
        with os.scandir(folder) as items:
            visible = [item for item in items if item.is_dir() and not item.name.startswith(".")]
    except OSError:  # not there, or not ours to read: nothing to choose, and no reason to fail the whole list
        return found
    for item in sorted(visible, key=lambda item: natural_key(item.name)):
        if folder_paths.is_within_directory(root, item.path):
            found.append(os.path.relpath(item.path, root).replace(os.sep, "/"))
            found += _subfolders(root, item.path, depth - 1) if depth > 1 else []
    return found
