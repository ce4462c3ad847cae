"""Load a LoRA with all that its file says, whole or cut."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...aclora_core.adapter import Adapter, ResizeConfig, load, own_report, resize, to_state_dict
from ...aclora_core.inspection import Rows, cut_rows, metadata_table
from .. import host
from ..host.apply_lora import applied
from . import files as lora_folder
from .resize import balanced

NO_CUT = "no cut"


class ACLoRALoad(io.ComfyNode):
    """A LoRA file as MODEL, CLIP, LORA_MODEL and readable metadata."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ACLoRALoad",
            display_name="Load AC-LoRA",
            category="AC-LoRA",
            description="Loads a LoRA file, whole or cut, applies it to what is connected, and shows what it says.",
            search_aliases=["load lora", "apply lora", "lora loader", "lora metadata", "trigger word", "lora rank"],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            inputs=[
                io.Combo.Input("lora_name", options=lora_folder.names(), tooltip="A LoRA file in models/loras."),
                _strength(
                    "strength_model",
                    "How strongly the diffusion model is changed: 1 as trained, 0 not at all,"
                    " negative away from the style.",
                ),
                _strength(
                    "strength_clip",
                    "How strongly the text encoder is changed. Without effect on a LoRA that has"
                    " no layers for it, as those that were trained without Text Encoder Options.",
                    advanced=True,
                ),
                io.DynamicCombo.Input(
                    "cut",
                    options=_cuts(),
                    optional=True,
                    tooltip="Whether each layer is cut to its largest components while loading. The file stays as it"
                    " is. no cut suits almost always; rank and energy show what fewer components change; signal takes"
                    " what the training found, from the file's own report.",
                ),
                io.Model.Input("model", optional=True, tooltip="The diffusion model to apply the LoRA to."),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder to apply the LoRA to."),
            ],
            outputs=[
                io.Model.Output("MODEL", display_name="model", tooltip="The diffusion model with the LoRA."),
                io.Clip.Output("CLIP", display_name="clip", tooltip="The text encoder with the LoRA."),
                io.LoraModel.Output(
                    "LORA_MODEL", display_name="lora_model", tooltip="The LoRA, cut as asked, to inspect or save."
                ),
                io.String.Output(
                    "METADATA",
                    display_name="metadata",
                    tooltip="A table of what the file holds, what the cut did, and how it was made. Show it with"
                    " Preview as Text.",
                ),
                io.Custom("RANK_REPORT").Output(
                    "RANK_REPORT",
                    display_name="rank_report",
                    tooltip="The report of the training, if the file has one: for Inspect, Resize and Save AC-LoRA."
                    " Without one nothing comes out, and they do without.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None, *, cut: object = None) -> bool | str:
        # The host hands a choice on in any case; behind the star it does not repeat the sentence for it.
        return True if lora_name is None else lora_folder.check_exists(lora_name)

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
        return "" if lora_name is None else lora_folder.state_of(lora_name)

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
        node_id = host.hidden_node_id(cls)
        choice = {"cut": _asked_cut(cls)} if cut is None else cut
        whole = load(lora_folder.path_of(lora_name))
        adapter, rows = _cut(lora_name, whole, choice, node_id)
        if rows:
            host.send_text("\n".join(f"{key}: {value}" for key, value in rows), node_id)
        lora_model = to_state_dict(adapter)
        if (model is not None and strength_model != 0) or (clip is not None and strength_clip != 0):
            model, clip = applied(lora_name, lora_model, adapter.metadata, model, clip, strength_model, strength_clip)
        if model is None:
            model = host.blocked("Load AC-LoRA gives a model only where one is connected to its model input.")
        if clip is None:
            clip = host.blocked("Load AC-LoRA gives a clip only where one is connected to its clip input.")
        return io.NodeOutput(model, clip, lora_model, metadata_table(lora_name, whole, rows), own_report(whole))


def _strength(name: str, tooltip: str, advanced: bool = False) -> io.Float.Input:
    return io.Float.Input(
        name, default=1.0, min=-100.0, max=100.0, step=0.01, tooltip=tooltip, advanced=advanced or None
    )


def _cuts() -> list[io.DynamicCombo.Option]:
    rank = io.Int.Input(
        "rank",
        default=8,
        min=1,
        max=4096,
        tooltip="How many components each layer keeps at most. Larger keeps more of the style.",
    )
    keep = io.Float.Input(
        "keep",
        default=0.95,
        min=0.01,
        max=1.0,
        step=0.01,
        round=False,
        tooltip="Share of the energy (squares of the singular values) that each layer keeps. Larger keeps more.",
    )
    inputs: dict[str, list[Any]] = {NO_CUT: [], "rank": [rank], "energy": [keep], "signal": []}
    return [io.DynamicCombo.Option(name, each) for name, each in inputs.items()]


def _asked_cut(cls: type[io.ComfyNode]) -> object:
    """The choice as the prompt has it, for the host leaves out one that it does not know; none in an older workflow."""
    hidden = getattr(cls, "hidden", None)
    prompt = getattr(hidden, "dynprompt", None)
    return prompt.get_node(hidden.unique_id)["inputs"].get("cut", NO_CUT) if prompt is not None else NO_CUT


def _cut(lora_name: str, adapter: Adapter, choice: dict[str, Any], node_id: str | None) -> tuple[Adapter, Rows]:
    """The adapter that was asked for, and for the table what was cut off."""
    if choice["cut"] == NO_CUT:
        return adapter, []
    config, text = _config(choice)
    kinds = ", ".join(sorted(set(adapter.other.values())))
    if not adapter.layers:
        return adapter, [("cut", f"not done: there is no plain LoRA layer to cut, only {kinds}, which stays whole")]
    report = own_report(adapter) if config.rule == "signal" else None
    if config.rule == "signal" and (report is None or not adapter.layers.keys() <= report.signal.keys()):
        raise ValueError(
            f"{lora_name} does not say what its training found to be signal, so it cannot be cut to that. Cut it to a"
            " share of the energy instead."
        )
    try:
        result, cuts = resize(adapter, balanced(adapter, node_id), config, report)
    except ValueError as error:
        raise ValueError(f"{lora_name}: {error}") from error
    rows = cut_rows(text, adapter, result, cuts)
    return result, [*rows, ("not cut", f"{kinds}, which stays whole")] if kinds else rows


def _config(choice: dict[str, Any]) -> tuple[ResizeConfig, str]:
    """The rule for a choice, and the choice in words."""
    if choice["cut"] == "rank":
        if choice["rank"] < 1:
            raise ValueError(f"A LoRA can be cut to rank 1 or more, but the rank is {choice['rank']}.")
        return ResizeConfig("fixed", choice["rank"]), f"to rank {choice['rank']}"
    if choice["cut"] == "energy":
        return ResizeConfig("energy", choice["keep"]), f"to {choice['keep']:.4g} of the energy of each layer"
    if choice["cut"] == "signal":
        return ResizeConfig("signal"), "to the signal of its training"
    names = ", ".join(option.key for option in _cuts())
    raise ValueError(f"There is no such cut as '{choice['cut']}'. Choose one of {names}.")
