"""Show what a LoRA holds, layer by layer, and cut it to less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io, ui
from PIL import Image

from ..aclora_core import tensor_file
from ..aclora_core.chart_paper import to_batch
from ..aclora_core.charts import note_chart, trajectory_chart
from ..aclora_core.inspection import Inspection, inspect_lora
from ..aclora_core.inspection_text import inspection_csv, inspection_json, inspection_table
from ..aclora_core.layer_charts import layer_map, spectrum_chart
from ..aclora_core.report import RankReport
from . import host, lora_folder

NONE = "none"  # the choice of no file
SIZE = (1024, 640)  # pixels of a chart: readable at half of it, on the node, and at full size


class ACLoRAInspect(io.ComfyNode):
    """A LORA_MODEL or a LoRA file as pictures, table, JSON and CSV."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ACLoRAInspect",
            display_name="Inspect AC-LoRA",
            category="AC-LoRA",
            description="Shows what a LoRA holds: how strong each layer is, and how many of its components count.",
            search_aliases=["inspect lora", "lora rank", "lora spectrum", "singular values", "lora info", "lora heat map"],
            is_output_node=True,
            is_experimental=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                *_sources("inspect"),
                io.Custom("RANK_REPORT").Input(
                    "rank_report",
                    optional=True,
                    tooltip="The report of the training that made this LoRA, from Train AC-LoRA. With it the charts"
                    " show what the training found to be signal, and how that changed. A file of Save AC-LoRA has its"
                    " own.",
                ),
                io.Boolean.Input("dark", default=False, tooltip="Light letters on a dark ground."),
            ],
            outputs=[
                io.Image.Output(
                    "CHARTS",
                    display_name="charts",
                    tooltip="The pictures, all of one size: components, rank and strength of each layer, and the ranks"
                    " during the training if they are known.",
                ),
                io.String.Output(
                    "TABLE",
                    display_name="table",
                    tooltip="All numbers as text: the file, then a line for each layer. Show it with Preview as Text.",
                ),
                io.String.Output("JSON", display_name="json", tooltip="All numbers as JSON, for programs."),
                io.String.Output("CSV", display_name="csv", tooltip="A line for each layer, for a spreadsheet."),
            ],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None, lora_model: object = False) -> bool | str:
        return _check_source(lora_model is not False, lora_name)  # None stands for a link

    @classmethod
    def fingerprint_inputs(
        cls, lora_name: str | None, dark: bool | None = None, lora_model: object = None, rank_report: object = None
    ) -> str:
        return _file_state(lora_name)

    @classmethod
    def execute(
        cls,
        lora_name: str,
        dark: bool = False,
        lora_model: dict[str, torch.Tensor] | None = None,
        rank_report: RankReport | None = None,
    ) -> io.NodeOutput:
        lora = _read(lora_model, lora_name)
        bar = host.Bar(1, host.hidden_node_id(cls))

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.show(done)

        found = inspect_lora(lora.tensors, lora.metadata, lora.name, lora.size, rank_report, show)
        charts = to_batch(_charts(found, dark))
        texts = inspection_table(found), inspection_json(found), inspection_csv(found)
        return io.NodeOutput(charts, *texts, ui=ui.PreviewImage(charts, cls=cls))


def _charts(found: Inspection, dark: bool) -> list[Image.Image]:
    """The pictures of an inspection; a note where no layer can be drawn."""
    layers = found.layers
    if not layers:
        note = "No layer of this LoRA is a plain LoRA layer, so there is nothing to draw. The table says what it holds."
        return [note_chart(note, SIZE, dark)]
    known = any(layer.signal is not None for layer in layers)
    signal = {layer.name: layer.signal for layer in layers if layer.signal is not None}
    rank = "Signal rank of each layer" if known else "Components for 95 % of each layer's energy"
    pictures = [
        spectrum_chart({layer.name: layer.spectrum for layer in layers}, signal, SIZE, dark),
        layer_map({layer.name: layer.shown_rank for layer in layers}, rank, SIZE, dark),
        layer_map({layer.name: layer.norm for layer in layers}, "Strength: how much each layer changes", SIZE, dark),
    ]
    if found.report is not None and found.report.restarts:
        pictures.append(trajectory_chart(found.report, SIZE, dark))
    return pictures


@dataclass(frozen=True)
class _Lora:
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]
    name: str
    size: int | None  # bytes of the file, if it is one


def _sources(verb: str) -> list[Any]:
    """The two inputs of which one gives the LoRA."""
    return [
        io.LoraModel.Input(
            "lora_model", optional=True, tooltip=f"The LoRA to {verb}, from Train or Load AC-LoRA or another node."
        ),
        io.Combo.Input(
            "lora_name",
            options=[NONE, *lora_folder.names()],
            default=NONE,
            tooltip=f"A LoRA file in models/loras to {verb}. Choose '{NONE}' where lora_model is connected.",
        ),
    ]


def _check_source(connected: bool, lora_name: str | None) -> bool | str:
    """True, or a sentence where not exactly one LoRA is given; lora_name is None for a link, which may give 'none'."""
    chosen = lora_name not in (None, NONE)
    if connected and chosen:
        return f"Two LoRAs are given: set lora_name to '{NONE}', or disconnect lora_model. lora_name is '{lora_name}'."
    if not connected and lora_name == NONE:
        return "No LoRA is given: connect lora_model, or choose a file in lora_name."
    if chosen and not lora_folder.exists(str(lora_name)):
        return f"There is no LoRA file '{lora_name}' in models/loras. Choose another; the key R reads the list again."
    return True


def _file_state(lora_name: str | None) -> str:
    """Changes whenever the chosen file does."""
    if lora_name in (None, NONE):
        return ""
    state = lora_folder.path_of(str(lora_name)).stat()
    return f"{state.st_mtime_ns} {state.st_size}"


def _read(lora_model: dict[str, torch.Tensor] | None, lora_name: str) -> _Lora:
    problem = _check_source(lora_model is not None, lora_name)
    if problem is not True:
        raise ValueError(problem)
    if lora_model is not None:
        return _Lora(lora_model, {}, "LORA_MODEL", None)
    path = lora_folder.path_of(lora_name)
    return _Lora(*tensor_file.read(path), lora_name, path.stat().st_size)
