"""Names and places in models/loras."""

from __future__ import annotations

import os
import re
from pathlib import Path

import folder_paths

from ...aclora_core.storage import SAFETENSORS_SUFFIXES

LORAS = "loras"  # ComfyUI's name of the folder
QUICKSTART = "aclora/ink_"  # how the names of the quickstart's LoRAs begin
LONGEST = 200  # bytes of a part of a name; drives allow 255, and a number and an ending are added


def names() -> list[str]:
    """The files that a loader offers."""
    return [name for name in folder_paths.get_filename_list(LORAS) if name.lower().endswith(SAFETENSORS_SUFFIXES)]


def exists(name: str) -> bool:
    return folder_paths.get_full_path(LORAS, name) is not None


def check_exists(name: str) -> bool | str:
    """True, or a sentence that says what to do."""
    if exists(name):
        return True
    if name.replace("\\", "/").startswith(QUICKSTART):
        return f"There is no LoRA file '{name}' in models/loras yet. Run the quickstart workflow first: it makes it."
    return f"There is no LoRA file '{name}' in models/loras. Choose another; the key R reads the list again."


def state_of(name: str) -> str:
    """Changes whenever the file does."""
    state = path_of(name).stat()
    return f"{state.st_mtime_ns} {state.st_size}"


def path_of(name: str) -> Path:
    return Path(folder_paths.get_full_path_or_raise(LORAS, name))


def forget_list() -> None:
    """Makes the host read the folder again; it goes by the folder's time, which some drives keep to two seconds."""
    folder_paths.filename_list_cache.pop(LORAS, None)


def target(filename: str) -> tuple[Path, Path]:
    """The first loras folder and the file in it, without a number; ValueError with a sentence for a bad name."""
    folder = Path(folder_paths.get_folder_paths(LORAS)[0])
    name = re.sub(r"\.(safetensors|sft)$", "", filename.strip().replace("\\", "/"), flags=re.IGNORECASE)
    check_name(filename, name, "models/loras")
    path = folder / f"{name}.safetensors"
    check_place(filename, folder, path, "models/loras")
    return folder, path


def check_name(given: str, name: str, where: str) -> None:
    """ValueError with a sentence for a name that leads out of its folder, or that some system cannot write."""
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or re.match(r"[A-Za-z]:", name):
        raise ValueError(f"'{given}' leads outside {where}. Give a name inside it, such as 'styles/ink'.")
    if re.search(r'[<>:"|?*\x00-\x1f]', name) or not all(map(_is_portable, parts)):
        raise ValueError(
            f"'{given}' cannot be a file name on every system. Use letters, digits, '-' and '_', and '/' between"
            " folders, such as 'styles/ink'."
        )


def check_place(given: str, folder: Path, path: Path, where: str) -> None:
    """ValueError with a sentence for a path that leads out of the folder, or that cannot be written to."""
    if not folder_paths.is_within_directory(str(folder), str(path)):
        raise ValueError(f"'{given}' leads outside {where} through a link. Choose another folder.")
    existing = next(parent for parent in path.parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"'{given}' cannot be saved: {existing.name} is no folder that can be written to.")


def numbered(path: Path) -> Path:
    """NAME_00001.safetensors, or the next number that no file of this name has."""
    pattern = re.compile(rf"{re.escape(path.stem)}_(\d+){re.escape(path.suffix)}", re.IGNORECASE)
    matches = [pattern.fullmatch(file.name) for file in path.parent.iterdir()] if path.parent.is_dir() else []
    number = max((int(match[1]) for match in matches if match), default=0) + 1
    return path.with_name(f"{path.stem}_{number:05}{path.suffix}")


def _is_portable(part: str) -> bool:
    # Windows keeps some names for devices, with any ending.
    reserved = re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", part, flags=re.IGNORECASE)
    return part != "" and part == part.strip(". ") and len(part.encode()) <= LONGEST and not reserved
