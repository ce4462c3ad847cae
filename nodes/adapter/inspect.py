"""Node that shows what a LoRA holds, layer by layer."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ...aclora_core.adapter import RankReport
from ...aclora_core.inspection import (
    inspect_lora,
    inspection_charts,
    inspection_csv,
    inspection_json,
    inspection_table,
    overview_chart,
    summary_rows,
    to_batch,
)
from .. import host
from ..node_images import images_on_node
from .source import check_source, read_source, source_inputs, source_state

SIZE = (1024, 640)  # pixels of a chart
ON_NODE = (512, 320)  # of the one on the node, whose letters are larger


class ACLoRAInspect(io.ComfyNode):
    """Shows a LORA_MODEL or a LoRA file as charts, table, JSON and CSV."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ACLoRAInspect",
            display_name="Inspect AC-LoRA",
            category="AC-LoRA",
            description="Shows what is inside a LoRA: how strongly each layer changes the model, and how much of its "
            "rank it uses.",
            search_aliases=["inspect lora", "lora rank", "lora spectrum", "singular values", "lora info", "heat map"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                *source_inputs("inspect"),
                io.Custom("RANK_REPORT").Input(
                    "rank_report",
                    optional=True,
                    tooltip="The training report of this LoRA, from Train AC-LoRA. With it, the charts also show the "
                    "training loss and how the ranks changed. Files saved by Save AC-LoRA contain their own.",
                ),
                io.Boolean.Input(
                    "dark",
                    default=False,
                    tooltip="On: charts are dark. Off: they follow ComfyUI's colour palette, dark or light.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "CHARTS",
                    display_name="charts",
                    tooltip="The charts, all of one size: singular values, rank and strength of each layer; with a "
                    "training report, also the training loss, the ranks over time and the loss of each truncation.",
                ),
                io.String.Output(
                    "TABLE",
                    display_name="table",
                    tooltip="All numbers as text: the file, then one line per layer. Show it with Preview as Text.",
                ),
                io.String.Output("JSON", display_name="json", tooltip="All numbers as JSON, for programs."),
                io.String.Output("CSV", display_name="csv", tooltip="One line per layer, for a spreadsheet."),
            ],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None = None, lora_model: object = False) -> bool | str:
        return host.tell_refusal(check_source(lora_model is not False, lora_name))  # None stands for a link

    @classmethod
    def fingerprint_inputs(
        cls, lora_name: str | None, dark: bool | None = None, lora_model: object = False, rank_report: object = None
    ) -> str:
        return source_state(lora_model is not False, lora_name)  # None stands for a link

    @classmethod
    def execute(
        cls,
        lora_name: str,
        dark: bool = False,
        lora_model: dict[str, Tensor] | None = None,
        rank_report: RankReport | None = None,
    ) -> io.NodeOutput:
        lora = read_source(lora_model, lora_name)
        node_id = host.hidden_node_id(cls)
        bar = host.ProgressBar(1, node_id)

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.show(done)
            host.raise_if_cancelled()

        found = inspect_lora(lora.tensors, None, lora.name, lora.size, rank_report, show)
        dark = dark or host.dark_theme()
        charts = to_batch(inspection_charts(found, SIZE, dark))
        texts = inspection_table(found), inspection_json(found), inspection_csv(found)
        # In a line each, since a node's text has no columns.
        summary = "\n".join(f"{key}: {value}" for key, value in summary_rows(found.file))
        images, problem = images_on_node(to_batch([overview_chart(found, ON_NODE, dark)]), cls)
        summary = "\n".join(filter(None, [lora.remark, summary, problem]))
        host.send_text(summary, node_id)
        return io.NodeOutput(charts, *texts, ui={**images, "text": (summary,)})
