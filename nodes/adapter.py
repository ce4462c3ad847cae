"""Save a LoRA where every loader finds it, and load one with all that its file says."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io, ui

from ..aclora_core import adapter_file, adapter_metadata
from . import host, lora_folder
from .lora_apply import applied

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class ACLoRASave(io.ComfyNode):
    """A LORA_MODEL as a file in models/loras."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ACLoRASave",
            display_name="Save AC-LoRA",
            category="AC-LoRA",
            description="Saves a LoRA into models/loras, where every LoRA loader finds it, with how it was made.",
            search_aliases=["save lora", "export lora", "lora file", "write safetensors"],
            is_output_node=True,
            is_experimental=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.LoraModel.Input("lora_model", tooltip="The LoRA to save, from Train AC-LoRA or another node."),
                io.String.Input(
                    "filename",
                    default="aclora",
                    tooltip="The file's name, without an ending. 'styles/ink' puts it into the folder 'styles' of"
                    " models/loras.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="fp16",
                    tooltip="How exactly each number is stored. fp16 suits almost always. fp32 doubles the file and is"
                    " for training on. bf16 is coarser, and holds larger numbers than fp16.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Off: a number is added to the name, so that no file is lost. On: a file of this name is"
                    " replaced, once the new one is complete.",
                ),
                io.String.Input(
                    "trigger",
                    default="",
                    optional=True,
                    tooltip="The word that calls the style. It is written into the file, and model browsers show it."
                    " Empty: the one from the training, if any.",
                ),
                io.Custom("RANK_REPORT").Input(
                    "rank_report",
                    optional=True,
                    tooltip="The report of the training: its settings and ranks are written into the file.",
                ),
                io.Image.Input(
                    "preview",
                    optional=True,
                    tooltip="A picture for the model library, stored in the file at 256 pixels at most. Of several, the"
                    " first.",
                ),
            ],
            outputs=[
                # Of any type, since ComfyUI links neither text nor its own drop-downs to an older loader's drop-down.
                io.AnyType.Output(
                    "lora_name",
                    display_name="lora_name",
                    tooltip="The name by which LoRA loaders know the file: link it to the lora_name of any of them.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, filename: str | None) -> bool | str:
        try:
            if filename is not None:  # None stands for a link, whose text is not known before the run
                lora_folder.target(filename)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        lora_model: dict[str, torch.Tensor],
        filename: str,
        precision: str = "fp16",
        overwrite: bool = False,
        trigger: str = "",
        rank_report: Any = None,
        preview: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        folder, path = lora_folder.target(filename)
        adapter = adapter_file.with_dtype(adapter_file.from_state_dict(lora_model), PRECISIONS[precision])
        path = path if overwrite else lora_folder.numbered(path)
        thumbnail = adapter_metadata.thumbnail_url(preview) if preview is not None else ""
        metadata = adapter_metadata.build_metadata(adapter, path.stem, rank_report, trigger.strip(), thumbnail)
        adapter_file.save(adapter, path, metadata)
        lora_folder.forget_list()
        name = str(path.relative_to(folder))
        text = f"Saved {name} in {folder}\n{path.stat().st_size / 1e6:.1f} MB, {metadata['modelspec.description']}"
        host.send_text(text, host.hidden_node_id(cls))
        return io.NodeOutput(name, ui=ui.PreviewText(text))


class ACLoRALoad(io.ComfyNode):
    """A LoRA file as MODEL, CLIP, LORA_MODEL and readable metadata."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ACLoRALoad",
            display_name="Load AC-LoRA",
            category="AC-LoRA",
            description="Loads a LoRA file, applies it to what is connected, and shows what it says of itself.",
            search_aliases=["load lora", "apply lora", "lora loader", "lora metadata", "trigger word"],
            is_experimental=True,
            inputs=[
                io.Combo.Input("lora_name", options=lora_folder.names(), tooltip="A LoRA file in models/loras."),
                io.Float.Input(
                    "strength_model",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="How strongly the diffusion model is changed: 1 as trained, 0 not at all, negative away"
                    " from the style.",
                ),
                io.Float.Input(
                    "strength_clip",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="How strongly the text encoder is changed. Without effect on a LoRA that has no layers for"
                    " it, as those of Train AC-LoRA.",
                    advanced=True,
                ),
                io.Model.Input("model", optional=True, tooltip="The diffusion model to apply the LoRA to."),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder to apply the LoRA to."),
            ],
            outputs=[
                io.Model.Output("MODEL", display_name="model", tooltip="The diffusion model with the LoRA."),
                io.Clip.Output("CLIP", display_name="clip", tooltip="The text encoder with the LoRA."),
                io.LoraModel.Output("LORA_MODEL", display_name="lora_model", tooltip="The LoRA, to inspect or save."),
                io.String.Output(
                    "METADATA",
                    display_name="metadata",
                    tooltip="What the file holds and how it was made, one line a fact. Show it with Preview as Text.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None) -> bool | str:
        return True if lora_name is None else lora_folder.check_exists(lora_name)

    @classmethod
    def fingerprint_inputs(
        cls,
        lora_name: str | None,
        strength_model: float | None = None,
        strength_clip: float | None = None,
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
        model: Any = None,
        clip: Any = None,
    ) -> io.NodeOutput:
        adapter = adapter_file.load(lora_folder.path_of(lora_name))
        lora_model = adapter_file.to_state_dict(adapter)
        table = adapter_metadata.metadata_table(lora_name, adapter, adapter.metadata)
        if (model is not None and strength_model != 0) or (clip is not None and strength_clip != 0):
            model, clip = applied(lora_name, lora_model, adapter.metadata, model, clip, strength_model, strength_clip)
        if model is None:
            model = host.blocked("Load AC-LoRA gives a model only where one is connected to its model input.")
        if clip is None:
            clip = host.blocked("Load AC-LoRA gives a clip only where one is connected to its clip input.")
        return io.NodeOutput(model, clip, lora_model, table)
