"""The folders of checkpoints, and how often trainings were cancelled since ComfyUI started."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import folder_paths

from ...paths import check_name, check_place

FOLDER = "aclora_checkpoints"  # beside models/loras, or as registered in extra_model_paths.yaml
_cancel_counts: Counter[Path] = Counter()


def resolve_checkpoint_folder(name: str) -> Path:
    """Return the folder of a training's checkpoints, which need not exist yet.

    Args:
        name: a name inside models/aclora_checkpoints, or the absolute path of any other folder.

    Raises:
        ValueError: the name is not allowed, or the folder cannot be created or written to.
    """
    cleaned = name.strip().replace("\\", "/")
    path = Path(cleaned).expanduser()
    if path.is_absolute():
        _check_absolute(path)
        return path
    check_name(name, cleaned, f"models/{FOLDER}")
    root = _root()
    check_place(name, root, root / cleaned, f"models/{FOLDER}")
    return root / cleaned


def record_cancel(folder: Path) -> None:
    """Record that a training ended early, so that ComfyUI runs it again when it is queued again."""
    _cancel_counts[folder] += 1


def cancel_count(folder: Path) -> int:
    """Return how often the training with this checkpoint folder was cancelled since ComfyUI started."""
    return _cancel_counts[folder]


def _root() -> Path:
    registered, _ = folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))
    return Path(registered[0]) if registered else Path(folder_paths.models_dir, FOLDER)


def _check_absolute(folder: Path) -> None:
    """Check that the folder exists or that its parent does: a typing error should not create a tree of folders."""
    existing = folder if folder.exists() else folder.parent
    if not existing.is_dir():
        raise ValueError(
            f"The checkpoints cannot be saved in {folder}: there is no folder {existing}. Create it first, or give "
            f"only a name, for a folder in models/{FOLDER}."
        )
    if not os.access(existing, os.W_OK):
        raise ValueError(
            f"The checkpoints cannot be saved in {folder}: {existing} is not writable. Choose another folder."
        )
