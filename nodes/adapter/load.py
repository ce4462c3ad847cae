"""Node that loads a LoRA file, whole or truncated, and shows its metadata."""

from __future__ import annotations

import math
from typing import Any

from comfy_api.latest import io

from ...aclora_core.adapter import Adapter, ResizeConfig, embedded_report, load, resize, to_state_dict
from ...aclora_core.inspection import Rows, metadata_table, reading_rows, truncation_rows
from .. import host
from .decompose import decompose_with_progress
from .files import check_lora_exists, file_state, lora_names, lora_path

NO_TRUNCATION = "no cut"


class ACLoRALoad(io.ComfyNode):
    """Loads a LoRA file as MODEL, CLIP, LORA_MODEL and readable metadata."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ACLoRALoad",
            display_name="Load AC-LoRA",
            category="AC-LoRA",
            description="Loads a LoRA file, whole or truncated, applies it to the model and the CLIP, and shows its "
            "metadata.",
            search_aliases=["load lora", "apply lora", "lora loader", "lora metadata", "trigger word", "lora rank"],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            inputs=[
                io.Combo.Input("lora_name", options=lora_names(), tooltip="A LoRA file in models/loras."),
                _strength(
                    "strength_model",
                    "Strength of the LoRA on the diffusion model: 1 as trained, 0 off, below 0 away from the style.",
                ),
                _strength(
                    "strength_clip",
                    "Strength of the LoRA on the text encoder. Only a LoRA whose text encoder was trained too makes "
                    "use of it.",
                    advanced=True,
                ),
                io.DynamicCombo.Input(
                    "cut",
                    display_name="truncate",
                    options=_truncation_options(),
                    optional=True,
                    tooltip="Whether to truncate each layer to a lower rank while loading; the file is not changed. "
                    "no cut is right for almost all uses. rank and energy show what a smaller LoRA would draw. signal "
                    "uses the ranks that the training found to matter, from the report in the file.",
                ),
                io.Model.Input("model", optional=True, tooltip="The diffusion model to apply the LoRA to."),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder to apply the LoRA to."),
            ],
            outputs=[
                io.Model.Output("MODEL", display_name="model", tooltip="The diffusion model with the LoRA."),
                io.Clip.Output("CLIP", display_name="clip", tooltip="The text encoder with the LoRA."),
                io.LoraModel.Output(
                    "LORA_MODEL", display_name="lora_model", tooltip="The LoRA, truncated as asked, to inspect or save."
                ),
                io.String.Output(
                    "METADATA",
                    display_name="metadata",
                    tooltip="A table of what the file holds, what the truncation removed, and how the LoRA was "
                    "trained. Show it with Preview as Text.",
                ),
                io.Custom("RANK_REPORT").Output(
                    "RANK_REPORT",
                    display_name="rank_report",
                    tooltip="The training report, if the file contains one, for Inspect, Resize and Save AC-LoRA. "
                    "They also work without it.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None = None, *, cut: object = None) -> bool | str:
        # The host passes `cut` in any case; for a keyword-only parameter it does not repeat the message.
        return True if lora_name is None else host.tell_refusal(check_lora_exists(lora_name))

    @classmethod
    def fingerprint_inputs(
        cls,
        lora_name: str | None,
        strength_model: float | None = None,
        strength_clip: float | None = None,
        cut: object = None,
        model: object = None,
        clip: object = None,
    ) -> str:
        return "" if lora_name is None else file_state(lora_name)

    @classmethod
    def execute(
        cls,
        lora_name: str,
        strength_model: float = 1.0,
        strength_clip: float = 1.0,
        cut: dict[str, Any] | None = None,
        model: Any = None,
        clip: Any = None,
    ) -> io.NodeOutput:
        _check_strengths(strength_model, strength_clip)
        node_id = host.hidden_node_id(cls)
        choice = {"cut": _requested_cut(cls)} if cut is None else cut
        whole = load(lora_path(lora_name))
        adapter, rows = _truncate(lora_name, whole, choice, node_id)
        lora_model = to_state_dict(adapter)
        if (model is not None and strength_model != 0) or (clip is not None and strength_clip != 0):
            model, clip, problems = host.apply_loaded_lora(
                lora_name, lora_model, adapter.metadata, model, clip, strength_model, strength_clip, adapter.left_out
            )
            rows += [("note", problem) for problem in problems]
        if shown := [*rows, *reading_rows(whole)]:
            host.send_text("\n".join(f"{key}: {value}" for key, value in shown), node_id)
        if model is None:
            model = host.block_output("Load AC-LoRA outputs a model only if one is connected to its model input.")
        if clip is None:
            clip = host.block_output("Load AC-LoRA outputs a clip only if one is connected to its clip input.")
        return io.NodeOutput(model, clip, lora_model, metadata_table(lora_name, whole, rows), embedded_report(whole))


def _check_strengths(*strengths: float) -> None:
    if not all(map(math.isfinite, strengths)):
        raise ValueError(
            f"The strengths must be numbers from -100 to 100, but are {strengths}. Set both, 1 as trained."
        )


def _strength(name: str, tooltip: str, advanced: bool = False) -> io.Float.Input:
    return io.Float.Input(
        name, default=1.0, min=-100.0, max=100.0, step=0.01, tooltip=tooltip, advanced=advanced or None
    )


def _truncation_options() -> list[io.DynamicCombo.Option]:
    rank = io.Int.Input(
        "rank",
        default=8,
        min=1,
        max=4096,
        tooltip="The highest rank that a layer keeps. Larger keeps more of the style.",
    )
    keep = io.Float.Input(
        "keep",
        default=0.95,
        min=0.01,
        max=1.0,
        step=0.01,
        round=False,
        tooltip="Share of the energy (the sum of the squared singular values) that each layer keeps. Larger keeps "
        "more.",
    )
    inputs: dict[str, list[Any]] = {NO_TRUNCATION: [], "rank": [rank], "energy": [keep], "signal": []}
    return [io.DynamicCombo.Option(name, each) for name, each in inputs.items()]


def _requested_cut(cls: type[io.ComfyNode]) -> str:
    """Return the choice in the prompt, as the host leaves out an unknown one; older workflows have none."""
    hidden = getattr(cls, "hidden", None)
    prompt = getattr(hidden, "dynprompt", None)
    if hidden is None or prompt is None:
        return NO_TRUNCATION
    return str(prompt.get_node(hidden.unique_id)["inputs"].get("cut", NO_TRUNCATION))


def _truncate(lora_name: str, adapter: Adapter, choice: dict[str, Any], node_id: str | None) -> tuple[Adapter, Rows]:
    """Return the adapter that was asked for, and rows on its truncation for the table."""
    if choice["cut"] == NO_TRUNCATION:
        return adapter, []
    config, text = _resize_config(choice)
    kinds = ", ".join(sorted(set(adapter.other.values())))
    if not adapter.layers:
        reason = f"not done: there is no plain LoRA layer to truncate, only {kinds}, which stays whole"
        return adapter, [("truncated", reason)]
    report = embedded_report(adapter) if config.rule == "signal" else None
    if config.rule == "signal" and (report is None or not adapter.layers.keys() <= report.signal.keys()):
        raise ValueError(
            f"{lora_name} has no signal ranks of its training, so it cannot be truncated to them. Truncate it to a"
            " share of the energy instead."
        )
    try:
        result, stats = resize(adapter, decompose_with_progress(adapter, node_id), config, report)
    except ValueError as error:
        raise ValueError(f"{lora_name}: {error}") from error
    rows = truncation_rows(text, adapter, result, stats)
    if kinds:
        rows.append(("not truncated", f"{kinds}, which stays whole"))
    return result, rows


def _resize_config(choice: dict[str, Any]) -> tuple[ResizeConfig, str]:
    """Return the settings for a choice, and the choice in words."""
    if choice["cut"] == "rank":
        if choice["rank"] < 1:
            raise ValueError(f"A LoRA can be truncated to rank 1 or more, but the rank is {choice['rank']}.")
        return ResizeConfig("fixed", choice["rank"]), f"to rank {choice['rank']}"
    if choice["cut"] == "energy":
        return ResizeConfig("energy", choice["keep"]), f"to {choice['keep']:.4g} of the energy of each layer"
    if choice["cut"] == "signal":
        return ResizeConfig("signal"), "to the signal of its training"
    names = ", ".join(option.key for option in _truncation_options())
    raise ValueError(f"There is no cut named '{choice['cut']}'. Choose one of {names}.")
