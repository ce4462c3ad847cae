"""The sheet of a training's previews: a row for each set, in which the steps that can be chosen stand out."""

from __future__ import annotations

import io as streams
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io, ui
from torch import Tensor

from ...aclora_core.inspection import SheetRow, step_sheet
from ...aclora_core.storage import to_pil, write_atomically
from ...aclora_core.training import KeptResult, PreviewSet, nearest_step

FILE = "sheet.png"  # in the folder of the training's previews


def preview_sheet(sets: Sequence[PreviewSet], kept: KeptResult | None, wanted: int, dark: bool) -> Tensor | None:
    """Return the sheet, (height, width, 3) in 0 to 1; None where there are no previews.

    Args:
        sets: of the training, with the same prompts, by step.
        kept: the steps that can be chosen; None where none was kept.
        wanted: the step that is asked for; 0 for the automatic one.
        dark: light letters on a dark background.
    """
    if not sets:
        return None
    images = {each.step: each.images for each in sets}
    choices = {kept.step, *kept.steps} if kept else set()
    rows = [_row(step, images.get(step, []), _marks(step, kept, wanted)) for step in sorted({*images, *choices})]
    return step_sheet(rows, sets[-1].prompts, dark)


def saved_sheet(sheet: Tensor, folder: Path) -> dict[str, Any]:
    """Write the sheet into the folder of the previews, and return it as a node shows it.

    Raises:
        OSError: it cannot be written.
    """
    file = streams.BytesIO()
    to_pil(sheet).save(file, "PNG", compress_level=4)
    write_atomically(folder / FILE, [file.getvalue()])
    subfolder = folder.relative_to(folder_paths.get_output_directory()).as_posix()
    return ui.SavedImages([ui.SavedResult(FILE, subfolder, io.FolderType.output)]).as_dict()


def _marks(step: int, kept: KeptResult | None, wanted: int) -> list[str]:
    if kept is None or step not in (kept.step, *kept.steps):
        return []
    marks = ["automatic"] if step == kept.step else []
    if wanted and step == nearest_step(kept, wanted):
        marks.append("chosen")
    return marks or ["can be chosen"]


def _row(step: int, images: Sequence[Tensor], marks: Sequence[str]) -> SheetRow:
    label = f"step {step}" if step else "without the LoRA"
    return SheetRow(label, images, ", ".join(marks), strong=bool(marks) and marks != ["can be chosen"])
