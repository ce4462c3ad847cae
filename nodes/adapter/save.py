"""Node that saves a LoRA into models/loras, where every loader finds it."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import torch
from comfy_api.latest import io, ui

from ...aclora_core.adapter import (
    FILE_FORMAT,
    Adapter,
    FileFormat,
    FormatChoice,
    RankReport,
    describe_layers,
    from_state_dict,
    left_out_lines,
    thumbnail_url,
)
from ...aclora_core.inspection import Rows, reading_rows
from ...aclora_core.text import size_text
from .. import host
from ..date_tokens import with_dates
from ..texts import check_text
from .files import numbered_path, output_path
from .precision import PRECISIONS
from .saving import write_lora

_FORMATS = ["automatic", *get_args(FileFormat)]


class ACLoRASave(io.ComfyNode):
    """Saves a LORA_MODEL as a file in models/loras."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ACLoRASave",
            display_name="Save AC-LoRA",
            category="AC-LoRA",
            description="Saves a LoRA in models/loras, where every LoRA loader finds it, and records in the file how "
            "it was trained.",
            search_aliases=["save lora", "export lora", "lora file", "write safetensors"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.LoraModel.Input("lora_model", tooltip="The LoRA to save, from Train AC-LoRA or another node."),
                io.String.Input(
                    "filename",
                    default="aclora",
                    tooltip="The file's name, without extension. 'styles/ink' saves it in the folder 'styles' of "
                    "models/loras; '%year%-%month%-%day%/ink' or '%date:yyyy-MM-dd%/ink' in a folder named after "
                    "today's date.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="fp16",
                    tooltip="Number format of the file. fp16 is right for almost all uses. fp32 doubles the size, for "
                    "programs that train a LoRA further. bf16 is coarser than fp16, but holds larger numbers.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Off: a number is added to the name, so that no file is overwritten. On: a file of this "
                    "name is replaced once the new one is complete.",
                ),
                io.String.Input(
                    "trigger",
                    default="",
                    optional=True,
                    tooltip="The word that calls up the style. It is stored in the file, and model browsers show it. "
                    "Empty: the one from the training, if any.",
                ),
                io.Custom("RANK_REPORT").Input(
                    "rank_report",
                    optional=True,
                    tooltip="The training report, whose settings and ranks are stored in the file. A LoRA from Train "
                    "AC-LoRA brings its own.",
                ),
                io.Image.Input(
                    "preview",
                    optional=True,
                    tooltip="An image for the model library, stored in the file at up to 256 pixels. Of several, the "
                    "first is used.",
                ),
                io.Combo.Input(
                    "format",
                    options=_FORMATS,
                    default=_FORMATS[0],
                    optional=True,
                    tooltip="How the layers are named in the file; ComfyUI reads all of these formats. automatic is "
                    "right for almost all uses: kohya for SD1.5 and SDXL, the most widely read format for other "
                    "models, and its own for a LoRA from a file. kohya is read by A1111, Forge, InvokeAI and sharing "
                    "sites; diffusers by diffusers and programs built on it.",
                ),
            ],
            outputs=[
                # Of any type, since ComfyUI links neither text nor its own drop-downs to an older loader's drop-down.
                io.AnyType.Output(
                    "lora_name",
                    display_name="lora_name",
                    tooltip="The file's name in the list of LoRA loaders: connect it to lora_name of any of them.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, filename: str | None = None) -> bool | str:
        # None stands for a link, whose text is not known before the run.
        return True if filename is None else host.refuse_by(lambda: output_path(with_dates(filename)))

    @classmethod
    def execute(
        cls,
        lora_model: dict[str, torch.Tensor],
        filename: str,
        precision: str = "fp16",
        overwrite: bool = False,
        trigger: str = "",
        rank_report: RankReport | None = None,
        preview: torch.Tensor | None = None,
        format: FormatChoice = "automatic",  # the name of the input
    ) -> io.NodeOutput:
        check_text("trigger", trigger)
        folder, path = output_path(with_dates(filename))
        adapter = from_state_dict(lora_model)
        path = path if overwrite else numbered_path(path)
        thumbnail, problem = _thumbnail(preview)
        dtype = PRECISIONS[precision]
        written, remark = write_lora(adapter, path, dtype, rank_report, trigger.strip(), thumbnail, format)
        name = str(path.relative_to(folder))
        keys = written.metadata.get(FILE_FORMAT, "")
        size = size_text(path.stat().st_size) + (" with its preview image" if thumbnail else "")
        text = f"Saved {name}: {size}, {describe_layers(adapter)}\nin {folder}"
        text += f"\nformat: {keys}" if keys else ""
        text += f"\n{remark}" if remark else ""
        text += _replaced_trigger(trigger.strip(), adapter, rank_report)
        text += "".join(f"\n{row}: {line}" for row, line in _rows(adapter))
        text += problem
        host.send_text(text, host.hidden_node_id(cls))
        return io.NodeOutput(name, ui=ui.PreviewText(text))


def _rows(adapter: Adapter) -> Rows:
    """Return rows on what the file has not got of the LoRA, and on what it has though ComfyUI does not use it."""
    kept = {name: reason for name, reason in adapter.left_out.items() if name in adapter.extra}
    dropped = {name: reason for name, reason in adapter.left_out.items() if name not in kept}
    rows = reading_rows(replace(adapter, left_out=dropped))
    return rows + [("kept, though ComfyUI does not use it", line) for line in left_out_lines(kept)]


def _replaced_trigger(trigger: str, adapter: Adapter, report: RankReport | None) -> str:
    """Return a line on a trigger that is not the one of the training, which may be a typing mistake; else ""."""
    trained = report.facts.trigger if report is not None else adapter.metadata.get("modelspec.trigger_phrase", "")
    if not trigger or not trained or trigger == trained:
        return ""
    return f"\nThe trigger word is '{trigger}'; the training used '{trained}'."


def _thumbnail(preview: torch.Tensor | None) -> tuple[str, str]:
    """The preview as a data URL, and a line of text if it cannot be used; the LoRA is saved all the same."""
    if preview is None:
        return "", ""
    try:
        return thumbnail_url(preview), ""
    except ValueError as error:
        return "", f"\nwithout the preview: {error}"
