"""The folders of checkpoints."""

from __future__ import annotations

import os
import re
from pathlib import Path

import folder_paths

from ...paths import check_name, check_place, shown

FOLDER = "aclora_checkpoints"  # beside models/loras, or as registered in extra_model_paths.yaml


def resolve_checkpoint_folder(name: str) -> Path:
    """Return the folder of a training's checkpoints, which need not exist yet.

    Of several registered folders it is in the one that has a folder of this name, else in the first.

    Args:
        name: a name inside models/aclora_checkpoints, or inside the folders registered as aclora_checkpoints.

    Raises:
        ValueError: the name is not allowed, or the folder cannot be created or written to.
    """
    cleaned = name.strip().replace("\\", "/")
    if cleaned.startswith(("/", "~")) or re.match(r"[A-Za-z]:", cleaned):
        raise ValueError(
            f"'{shown(name)}' is a path, but only a name is possible here, such as 'ink': checkpoints go into "
            f"models/{FOLDER}. To use another drive, register a folder on it as {FOLDER} in extra_model_paths.yaml "
            "and start ComfyUI again."
        )
    check_name(name, cleaned, f"models/{FOLDER}")
    roots = _roots()
    root = next((each for each in roots if os.path.isdir(each / cleaned)), roots[0])
    check_place(name, root, root / cleaned, f"models/{FOLDER}")
    return root / cleaned


def _roots() -> list[Path]:
    registered, _ = folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))
    return list(map(Path, registered)) or [Path(folder_paths.models_dir, FOLDER)]
