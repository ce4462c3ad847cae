"""Node that truncates a LoRA to the ranks that it needs."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from ...aclora_core.adapter import (
    RankReport,
    ResizeConfig,
    file_size,
    from_state_dict,
    resize,
    to_state_dict,
)
from ...aclora_core.inspection import reading_rows, truncation_table
from .. import host
from .decompose import decompose_with_progress
from .precision import PRECISIONS
from .source import check_source, read_source, source_inputs, source_state

AS_IT_IS = "as it is"


class ACLoRAResize(io.ComfyNode):
    """Truncates a LORA_MODEL or a file to smaller ranks; nothing is written."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ACLoRAResize",
            display_name="Resize AC-LoRA",
            category="AC-LoRA",
            description="Makes a LoRA smaller: truncates each layer to the rank it needs, by a rule or to fit a file "
            "size.",
            search_aliases=["lora resize", "reduce lora rank", "shrink lora", "svd lora", "prune lora", "lora size"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                *source_inputs("truncate"),
                io.DynamicCombo.Input(
                    "rule",
                    options=_rule_options(),
                    tooltip="How the rank of each layer is chosen. energy is right for almost all uses; signal uses "
                    "the ranks that the training found to matter; file size keeps as much as fits into a number of "
                    "megabytes.",
                ),
                io.Int.Input(
                    "max_rank",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="Maximum rank of every layer, whatever the rule says. 0: no limit.",
                ),
                io.Combo.Input(
                    "precision",
                    options=["fp16", "bf16", "fp32", AS_IT_IS],
                    default="fp16",
                    tooltip="Number format of the result. Choose the one you will save with: fp16 is right for almost "
                    "all uses; fp32 doubles the size, for programs that train a LoRA further.",
                ),
                io.Boolean.Input(
                    "dry_run",
                    default=False,
                    tooltip="On: only reports what would be lost and outputs no LoRA, so nothing is saved by mistake.",
                ),
                io.Custom("RANK_REPORT").Input(
                    "rank_report",
                    optional=True,
                    tooltip="The training report, for the rule signal (files saved by AC-LoRA contain their own); the "
                    "rule file size leaves room for it.",
                ),
            ],
            outputs=[
                io.LoraModel.Output(
                    "LORA_MODEL", display_name="lora_model", tooltip="The truncated LoRA, to save or apply."
                ),
                io.String.Output(
                    "LOST",
                    display_name="lost",
                    tooltip="What the truncation keeps and loses, in total and for each layer. Show it with Preview "
                    "as Text.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, lora_name: str | None = None, lora_model: object = False, *, rule: dict[str, Any] | None = None
    ) -> bool | str:
        if rule is None:  # the host leaves out a choice that it does not know
            return f"There is no such rule. Choose one of {', '.join(option.key for option in _rule_options())}."
        return host.tell_refusal(check_source(lora_model is not False, lora_name))  # None stands for a link

    @classmethod
    def fingerprint_inputs(
        cls,
        lora_name: str | None,
        lora_model: object = False,
        rule: object = None,
        max_rank: int | None = None,
        precision: str | None = None,
        dry_run: bool | None = None,
        rank_report: object = None,
    ) -> str:
        return source_state(lora_model is not False, lora_name)  # None stands for a link

    @classmethod
    def execute(
        cls,
        lora_name: str,
        rule: dict[str, Any],
        lora_model: dict[str, Tensor] | None = None,
        max_rank: int = 0,
        precision: str = "fp16",
        dry_run: bool = False,
        rank_report: RankReport | None = None,
    ) -> io.NodeOutput:
        lora = read_source(lora_model, lora_name)
        config = ResizeConfig(
            rule["rule"], _rule_parameter(rule), max_rank, PRECISIONS.get(precision), rule.get("drop_layers", False)
        )
        node_id = host.hidden_node_id(cls)
        try:
            adapter = from_state_dict(lora.tensors)
            truncated, stats = resize(adapter, decompose_with_progress(adapter, node_id), config, rank_report)
        except ValueError as error:
            raise ValueError(f"{lora.name}: {error}") from error
        notes = [f"{name.capitalize()}: {text}" for name, text in reading_rows(adapter)]
        notes += [lora.remark] if lora.remark else []
        before = file_size(adapter, dtype=None) if lora.size is None else lora.size
        table = truncation_table(stats, (before, file_size(truncated, dtype=None)), truncated.other, notes)
        text = f"Dry run: no LoRA is output.\n\n{table}" if dry_run else table
        host.send_text(text.partition("\n\nlayer ")[0], node_id)
        if dry_run:
            result = host.block_output("Resize AC-LoRA outputs no LoRA in a dry run. Switch dry_run off.")
        else:
            result = to_state_dict(truncated)
        return io.NodeOutput(result, text, ui=ui.PreviewText(text))


def _rule_options() -> list[io.DynamicCombo.Option]:
    def share(name: str, default: float, tooltip: str) -> io.Float.Input:
        return io.Float.Input(name, default=default, min=0.01, max=1.0, step=0.01, round=False, tooltip=tooltip)

    size_inputs = [
        io.Float.Input(
            "megabytes",
            default=10.0,
            min=0.01,
            max=100_000.0,
            step=0.1,
            round=False,
            tooltip="Maximum size of the file, saved in this precision and without a preview image.",
        ),
        io.Boolean.Input(
            "drop_layers",
            default=False,
            tooltip="On: layers that change little may be left out. Off: each keeps at least rank 1.",
        ),
    ]
    keep = "Share of {} that each layer keeps. Larger keeps more and makes a larger file."
    by_name: dict[str, list[Any]] = {
        "energy": [share("keep", 0.98, keep.format("the energy (the sum of the squared singular values)"))],
        "signal": [],
        "file size": size_inputs,
        "fixed": [
            io.Int.Input(
                "rank",
                default=16,
                min=1,
                max=4096,
                tooltip=("The same rank for every layer; layers of a lower rank keep theirs."),
            )
        ],
        "sum": [share("keep", 0.9, keep.format("the sum of the singular values"))],
        "frobenius": [share("keep", 0.99, keep.format("the size (Frobenius norm) of the change"))],
        "ratio": [
            io.Float.Input(
                "ratio",
                default=0.1,
                min=0.0,
                max=0.99,
                step=0.01,
                round=False,
                tooltip="Keeps singular values above this share of the layer's largest. Larger removes more.",
            )
        ],
        "threshold": [
            io.Float.Input(
                "smallest",
                default=0.01,
                min=0.0,
                max=1e6,
                step=0.001,
                round=False,
                tooltip="Keeps singular values above this value, the same for all layers. Larger removes more.",
            )
        ],
        "knee": [],
        "noise_floor": [],
    }
    return [io.DynamicCombo.Option(name, inputs) for name, inputs in by_name.items()]


def _rule_parameter(rule: dict[str, Any]) -> float:
    """Return the parameter of the chosen rule; 0 for a rule without one."""
    return next((float(value) for key, value in rule.items() if key not in ("rule", "drop_layers")), 0.0)
