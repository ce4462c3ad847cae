"""Writing a LoRA into models/loras."""

from __future__ import annotations

from pathlib import Path

import torch

from ...aclora_core.adapter import Adapter, FormatChoice, RankReport, build_metadata, save_in_format
from .files import invalidate_list


def write_lora(
    adapter: Adapter,
    path: Path,
    dtype: torch.dtype,
    report: RankReport | None = None,
    trigger: str = "",
    thumbnail: str = "",
    file_format: FormatChoice = "automatic",
) -> tuple[Adapter, str]:
    """Write a LoRA file with how it was made, and have ComfyUI list it.

    Args:
        adapter: the LoRA.
        path: of the file, from `output_path`.
        dtype: of the numbers in the file.
        report: of the training, if it is known.
        trigger: the word that calls the style; that of the report if it is empty.
        thumbnail: an image as a data URL, or "".
        file_format: whose keys the file gets.

    Returns:
        The adapter as the file has it, and a sentence for the user or "".

    Raises:
        ValueError: the adapter is empty, holds NaN or infinity, or does not fit into the format or the dtype.
        OSError: the file cannot be written; the old file is unchanged.
    """
    metadata = build_metadata(adapter, path.stem, report, trigger, thumbnail)
    written, remark = save_in_format(adapter, path, metadata, file_format, dtype)
    invalidate_list()
    return written, remark
