"""The node that trains a style."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from comfy_api.latest import io
from torch import Tensor

from ...aclora_core.config import LayerPreset, TrainConfig
from .. import host
from .cancels import cancel_count, record_cancel, run_was_cancelled
from .job import TrainingJob
from .options.options import OPTIONS_TYPE, Options
from .presets import with_preset
from .status import NOT_TRAINED

# A newer ComfyUI sends what the node showed again where its result comes from the cache, as after a reload of the page.
_SHOWN_AGAIN = {"has_intermediate_output": True} if hasattr(io.Schema, "has_intermediate_output") else {}


class ACLoRATrain(io.ComfyNode):
    """Train AC-LoRA: a folder of images becomes a style."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ACLoRATrain",
            display_name="Train AC-LoRA",
            category="AC-LoRA",
            description="Trains a LoRA on captioned images, finds the rank that each layer needs, and outputs the "
            "model with the learned style. Cancel keeps what has been learned so far.",
            search_aliases=["train lora", "lora training", "style training", "finetune", "svd lora", "lora rank"],
            is_input_list=True,
            inputs=[*_links(), *_widgets()],
            outputs=_outputs(),
            # With the last two the saved picture of a training holds its workflow.
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            **_SHOWN_AGAIN,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> int:
        """Return a number that changes with each cancel, so that a cancelled training does not come from the cache."""
        return cancel_count(host.hidden_node_id(cls))

    @classmethod
    def execute(
        cls,
        model: list[Any],
        latents: list[Any],
        conditioning: list[Any],
        options: Sequence[Options] = (),
        before: Sequence[Tensor] = (),
        **widgets: list[Any],
    ) -> io.NodeOutput:
        chosen = options[0] if options else Options()
        latents, conditioning = host.one_image_each(latents, conditioning)
        # Every input arrives as a list, since latents and conditioning are lists.
        settings = {name: values[0] for name, values in widgets.items()}
        step = settings.pop("step", 0)
        settings, preset_remark = with_preset(
            {**settings, **chosen.settings}, chosen.preset, host.style_image_count(latents), host.base_name(model[0])
        )
        config = TrainConfig(**settings)
        if run_was_cancelled():
            return _not_trained(host.hidden_node_id(cls))
        job = TrainingJob(cls, model[0], latents, conditioning, chosen, config, step, before)
        return job.run(preset_remark)


def _not_trained(node_id: str | None) -> io.NodeOutput:
    """Return outputs that block the nodes after this one, which say nothing, as the user has cancelled the run."""
    record_cancel(node_id)
    host.send_text(NOT_TRAINED, node_id)
    outputs = [host.block_output(None) for _ in _outputs()]
    return io.NodeOutput(*outputs, ui={"text": (NOT_TRAINED,)})


def _links() -> list[Any]:
    return [
        io.Model.Input(
            "model",
            tooltip=("The model that learns the style. It is not changed; the output is a copy with the style."),
        ),
        io.Latent.Input("latents", tooltip="The encoded images, from Load AC-LoRA Dataset or VAE Encode."),
        io.Conditioning.Input(
            "conditioning", tooltip="The encoded captions, one for each image, in the order of the latents."
        ),
        OPTIONS_TYPE.Input(
            "options",
            optional=True,
            tooltip="Optional: an AC-LoRA options node, which changes how the training works. To use several, chain "
            "them.",
        ),
        io.Image.Input(
            "before",
            optional=True,
            tooltip="Images drawn without the style. Connect them to have them drawn before the training starts; the "
            "node shows them until its first chart. They do not affect the training.",
        ),
    ]


def _widgets() -> list[Any]:
    return [
        io.Int.Input(
            "steps",
            default=TrainConfig.steps,
            min=1,
            max=100_000,
            tooltip="Maximum number of training steps. Training stops by itself (early stopping) once it has learned "
            "its images well enough, but not before step 560. With fewer steps the style stays weaker.",
        ),
        io.Float.Input(
            "learning_rate",
            default=TrainConfig.learning_rate,
            min=1e-7,
            max=10.0,
            step=1e-5,
            round=False,
            tooltip="Size of each step. A larger one learns faster, but the model forgets more; a smaller one is "
            "gentler and needs more steps.",
        ),
        io.Int.Input(
            "batch_size",
            default=TrainConfig.batch_size,
            min=1,
            max=256,
            tooltip="Images per step. A larger batch is steadier, but takes more memory and time per step.",
        ),
        io.Int.Input(
            "max_rank",
            default=TrainConfig.max_rank,
            min=1,
            max=1024,
            tooltip="Maximum rank of each layer. The default suits most styles: at the end, each layer is truncated "
            "to the rank it uses. A larger one takes more memory and hardly changes the images.",
        ),
        io.Combo.Input(
            "layers",
            options=list(get_args(LayerPreset)),
            default=TrainConfig.layers,
            tooltip="Which layers are trained. The other defaults were tuned for all layers; fewer layers need less "
            "memory and make a smaller file.",
        ),
        io.Int.Input(
            "seed",
            default=TrainConfig.seed,
            min=0,
            max=2**63 - 1,
            control_after_generate=io.ControlAfterGenerate.fixed,
            tooltip="Seed of the initial weights, the order of the images, the noise and the timesteps. The same seed "
            "gives the same style again.",
        ),
        io.Int.Input(
            "step",
            default=0,
            min=0,
            max=100_000,
            optional=True,
            tooltip="Which training step the LoRA is taken from. 0: the one at which the training stops. After a "
            "training, the node lists the steps that were kept; enter one of them and run again to get its LoRA at "
            "once, without training. With AC-LoRA Preview Options, the node shows images of each.",
        ),
    ]


def _outputs() -> list[Any]:
    return [
        io.Model.Output(display_name="model", tooltip="The model with the style, ready for a KSampler."),
        io.LoraModel.Output(
            display_name="lora_model",
            tooltip="The LoRA alone, for Save AC-LoRA, Inspect AC-LoRA and Resize AC-LoRA.",
        ),
        io.LossMap.Output(display_name="loss_map", tooltip="The loss of every step, for ComfyUI's Plot Loss Graph."),
        io.Custom("RANK_REPORT").Output(
            display_name="rank_report",
            tooltip="The training report: settings, losses and ranks.",
        ),
        io.Clip.Output(
            display_name="clip",
            tooltip="The trained text encoder. Only with AC-LoRA Text Encoder Options; otherwise use the loader's "
            "clip.",
        ),
    ]
