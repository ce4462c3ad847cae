"""Where the checkpoints of a training lie, and which trainings were cancelled since ComfyUI started."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import folder_paths

from ...paths import check_name, check_place

FOLDER = "aclora_checkpoints"  # beside models/loras, or where extra_model_paths.yaml says
_cancelled: Counter[Path] = Counter()


def folder_of(name: str) -> Path:
    """The folder of this training's checkpoints; ValueError with a sentence for a bad name.

    name: within models/aclora_checkpoints, or a whole path to a folder of the user's own.
    """
    cleaned = name.strip().replace("\\", "/")
    elsewhere = Path(cleaned).expanduser()
    if elsewhere.is_absolute():
        return _checked(elsewhere)
    check_name(name, cleaned, f"models/{FOLDER}")
    registered, _ = folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))
    root = Path(registered[0] if registered else folder_paths.models_dir, *([] if registered else [FOLDER]))
    check_place(name, root, root / cleaned, f"models/{FOLDER}")
    return root / cleaned


def _checked(folder: Path) -> Path:
    """A folder that is there, or that can be made in one that is, so that a slip of the pen makes no new ones."""
    existing = folder if folder.exists() else folder.parent
    if not existing.is_dir():
        raise ValueError(
            f"The checkpoints cannot be kept in {folder}: there is no folder {existing}. Make it first, or give a name "
            f"alone, which makes a folder in models/{FOLDER}."
        )
    if not os.access(existing, os.W_OK):
        raise ValueError(f"The checkpoints cannot be kept in {folder}: {existing} cannot be written to.")
    return folder


def note_cancel(folder: Path) -> None:
    """Remembers that a training ended early, so that it is not taken for done when it is queued again."""
    _cancelled[folder] += 1


def cancels(folder: Path) -> int:
    """How often that was."""
    return _cancelled[folder]
