"""LoRA files in models/loras: their names, paths and states."""

from __future__ import annotations

import re
from pathlib import Path

import folder_paths

from ...aclora_core.storage import SAFETENSORS_SUFFIXES
from ..paths import check_name, check_place, shown

LORAS = "loras"  # ComfyUI's name of the folder
QUICKSTART = "aclora/ink_"  # how the names of the quickstart's LoRAs begin


def lora_names() -> list[str]:
    """Return the names of the files that loaders offer."""
    return [name for name in folder_paths.get_filename_list(LORAS) if name.lower().endswith(SAFETENSORS_SUFFIXES)]


def lora_exists(name: str) -> bool:
    """Return whether a LoRA file of this name exists."""
    return isinstance(name, str) and "\0" not in name and folder_paths.get_full_path(LORAS, name) is not None


def check_lora_exists(name: str) -> bool | str:
    """Return True, or a sentence that says what to do, as validate_inputs does."""
    if lora_exists(name):
        return True
    if str(name).replace("\\", "/").startswith(QUICKSTART):
        missing = f"There is no LoRA file '{shown(name)}' in models/loras yet."
        return f"{missing} Run the quickstart workflow first: it makes it."
    return f"There is no LoRA file '{shown(name)}' in models/loras. Choose another, or press R to refresh the list."


def file_state(name: str) -> str:
    """Return a text that changes whenever the file does."""
    state = lora_path(name).stat()
    return f"{state.st_mtime_ns} {state.st_size}"


def lora_path(name: str) -> Path:
    """Return the path of a LoRA file.

    Raises:
        FileNotFoundError: there is none of this name.
    """
    return Path(folder_paths.get_full_path_or_raise(LORAS, name))


def invalidate_list() -> None:
    """Make the host read the folder again; it goes by the folder's time, which some drives round to two seconds."""
    folder_paths.filename_list_cache.pop(LORAS, None)


def output_path(filename: str) -> tuple[Path, Path]:
    """Return the first loras folder and the path of a new file in it, without a number.

    Raises:
        ValueError: the name leads outside the folder, is not portable, or cannot be written to.
    """
    folder = Path(folder_paths.get_folder_paths(LORAS)[0])
    name = re.sub(r"\.(safetensors|sft)$", "", filename.strip().replace("\\", "/"), flags=re.IGNORECASE)
    check_name(filename, name, "models/loras")
    path = folder / f"{name}.safetensors"
    check_place(filename, folder, path, "models/loras")
    return folder, path


def numbered_path(path: Path) -> Path:
    """Return NAME_00001.safetensors, or the number after the highest that a file of this name has."""
    pattern = re.compile(rf"{re.escape(path.stem)}_(\d+){re.escape(path.suffix)}", re.IGNORECASE)
    matches = [pattern.fullmatch(file.name) for file in path.parent.iterdir()] if path.parent.is_dir() else []
    number = max((int(match[1]) for match in matches if match), default=0) + 1
    return path.with_name(f"{path.stem}_{number:05}{path.suffix}")
