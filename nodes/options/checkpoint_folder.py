"""Where the checkpoints of a training lie, and which trainings were cancelled since ComfyUI started."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import folder_paths

from .. import lora_folder

FOLDER = "aclora_checkpoints"  # beside models/loras, or where extra_model_paths.yaml says
_cancelled: Counter[Path] = Counter()


def folder_of(name: str) -> Path:
    """The folder of this training's checkpoints; ValueError with a sentence for a bad name."""
    cleaned = name.strip().replace("\\", "/")
    lora_folder.check_name(name, cleaned, f"models/{FOLDER}")
    registered, _ = folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))
    root = Path(registered[0] if registered else folder_paths.models_dir, *([] if registered else [FOLDER]))
    lora_folder.check_place(name, root, root / cleaned, f"models/{FOLDER}")
    return root / cleaned


def note_cancel(folder: Path) -> None:
    """Remembers that a training ended early, so that it is not taken for done when it is queued again."""
    _cancelled[folder] += 1


def cancels(folder: Path) -> int:
    """How often that was."""
    return _cancelled[folder]
