"""Writing a LoRA into models/loras."""

from __future__ import annotations

from pathlib import Path

from ...aclora_core.adapter import Adapter, RankReport, build_metadata, save
from .files import invalidate_list


def write_lora(
    adapter: Adapter, path: Path, report: RankReport | None = None, trigger: str = "", thumbnail: str = ""
) -> None:
    """Write a LoRA file with how it was made, and have ComfyUI list it.

    Args:
        adapter: in the type of numbers that the file gets.
        path: of the file, from `output_path`.
        report: of the training, if it is known.
        trigger: the word that calls the style; that of the report if it is empty.
        thumbnail: an image as a data URL, or "".

    Raises:
        ValueError: the adapter is empty or holds NaN or infinity.
        OSError: the file cannot be written; the old file is unchanged.
    """
    save(adapter, path, build_metadata(adapter, path.stem, report, trigger, thumbnail))
    invalidate_list()
