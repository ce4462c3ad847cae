"""The node that trains a style."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

from comfy_api.latest import io

from ...aclora_core.adapter import RankReport, recent_loss, to_state_dict
from ...aclora_core.config import LayerPreset, TrainConfig
from ...aclora_core.inspection import training_chart
from ...aclora_core.training import Progress, train, training_summary
from .. import host
from .display import LivePreviews
from .options.checkpoint_folder import note_cancel
from .options.options import TYPE as OPTIONS
from .options.options import Options

_PICTURE_EVERY = 2.0  # seconds between two live charts
_NO_CLIP = (
    "Train AC-LoRA gives a clip only where AC-LoRA Text Encoder Options is connected to its options. Connect the clip "
    "of the loader in its place."
)


class ACLoRATrain(io.ComfyNode):
    """Train AC-LoRA: a folder of images becomes a style."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ACLoRATrain",
            display_name="Train AC-LoRA",
            category="AC-LoRA",
            description="Learns a style from captioned pictures as a LoRA whose ranks set themselves, and gives the "
            "model with the style in it. Cancel keeps what was learned so far.",
            search_aliases=["train lora", "lora training", "style training", "finetune", "svd lora", "lora rank"],
            is_input_list=True,
            inputs=[*_links(), *_widgets()],
            outputs=_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: list[Any],
        latents: list[Any],
        conditioning: list[Any],
        options: Sequence[Options] = (),
        **widgets: list[Any],
    ) -> io.NodeOutput:
        chosen = options[0] if options else Options()
        # Every input comes as a list, since the images do.
        config = TrainConfig(**{**{name: given[0] for name, given in widgets.items()}, **chosen.settings})
        shown = LivePreviews(chosen.previews)
        bar = host.Bar(config.steps, host.hidden_node_id(cls))
        with host.training_session(model[0], latents, conditioning, chosen.clip) as (network, images):
            previews = shown.drawn_with(network, images, config.seed)
            show = _Show(bar, shown)
            checkpoints = chosen.checkpoints
            result = train(network, images, config, show, host.cancelled, checkpoints=checkpoints, previews=previews)
            facts = replace(result.report.facts, base_model=network.base_name, resolution=images.resolution)
        if note := host.note_on(model[0]):
            facts = replace(facts, notes=f"{note} {facts.notes}".strip())
        report, lora_model = replace(result.report, facts=facts), to_state_dict(result.adapter)
        if host.cancelled():
            host.accept_cancel()
            show.given(report, config.steps)
            if checkpoints:
                note_cancel(checkpoints.folder)
        summary = _summary(report, bool(checkpoints)) + shown.remark
        host.send_text(summary, host.hidden_node_id(cls))  # in place of the last step's line
        adapted, clip = host.with_adapter(model[0], chosen.clip, lora_model)
        # The host's Plot Loss Graph fails on a number that is none, and with it all that is behind it.
        losses = list(filter(math.isfinite, report.losses))
        return io.NodeOutput(
            adapted,
            lora_model,
            {"loss": losses},
            report,
            clip or host.blocked(_NO_CLIP),
            ui={"text": (summary,)},
        )


def _summary(report: RankReport, can_go_on: bool) -> str:
    """What the node says in the end; after a cancel also what to do next."""
    go_on = " Run again to go on." if can_go_on else " Run again gives the same at once; change the seed to train anew."
    return training_summary(report) + ("" if report.facts.cancelled is None else go_on)


class _Show:
    """Called after every step: moves the bar, and now and then draws the chart."""

    def __init__(self, bar: host.Bar, previews: LivePreviews) -> None:
        self.bar, self.previews = bar, previews
        self.drawn = -math.inf

    def __call__(self, progress: Progress) -> None:
        picture = None
        self.bar.total = progress.total + progress.remaining
        last = progress.done == progress.total or host.cancelled()
        if last or time.monotonic() - self.drawn > _PICTURE_EVERY:
            planned = progress.total - progress.done + len(progress.losses)
            chart = training_chart(progress.losses, planned, progress.restarts, progress.validation)
            picture = self.previews.below(chart)
            self.drawn = time.monotonic()
        self.bar.show(progress.done, _line(progress, self.bar), picture)

    def given(self, report: RankReport, steps: int) -> None:
        """The chart of what comes out, which the host does not show while a cancel is under way."""
        chart = training_chart(report.losses, steps, report.restarts, report.validation)
        self.bar.show(self.bar.done, picture=self.previews.below(chart))


def _line(progress: Progress, bar: host.Bar) -> str:
    """What the node says while it trains."""
    loss = recent_loss(progress.losses)
    parts = [progress.stage, "no finite loss" if loss is None else f"loss {loss:.3f}"]
    if progress.validation:
        parts.append(f"set aside {progress.validation[-1][1]:.3f}")
    parts.append(f"learning rate {progress.learning_rate:.2g}")
    if progress.skipped_steps:
        parts.append(f"steps left out: {progress.skipped_steps}")
    if progress.resumed_at:
        parts.append(f"resumed at step {progress.resumed_at}")
    # A second pass is as long as the first took to its best step, which is not known yet.
    most = "up to " if progress.remaining else ""
    line = ", ".join([*parts, most + bar.time_left(progress.done, progress.resumed_at)])
    return "\n".join([line, *filter(None, [progress.memory]), *progress.notes[-1:]])


def _links() -> list[Any]:
    return [
        io.Model.Input("model", tooltip="The model that learns the style. It stays as it is; a copy gets the style."),
        io.Latent.Input("latents", tooltip="The pictures, as the dataset node or a VAE Encode gives them."),
        io.Conditioning.Input(
            "conditioning", tooltip="The caption of each picture, in the order of the latents; as many as pictures."
        ),
        OPTIONS.Input(
            "options",
            optional=True,
            tooltip="Nothing, or one of the AC-LoRA options nodes: they change how the training goes. Several are "
            "connected one behind the other.",
        ),
    ]


def _widgets() -> list[Any]:
    return [
        io.Int.Input(
            "steps",
            default=TrainConfig.steps,
            min=1,
            max=100_000,
            tooltip="How often the adapter is changed, at most. With eight pictures or more some are set aside, and "
            "training stops by itself once more steps only copy the pictures instead of the style.",
        ),
        io.Float.Input(
            "learning_rate",
            default=TrainConfig.learning_rate,
            min=1e-7,
            max=10.0,
            step=1e-5,
            round=False,
            tooltip="How far each step goes. Larger learns faster and forgets more of the model; smaller is gentler "
            "and needs more steps.",
        ),
        io.Int.Input(
            "batch_size",
            default=TrainConfig.batch_size,
            min=1,
            max=256,
            tooltip="Pictures in one step. Larger is steadier and takes more memory and time a step.",
        ),
        io.Int.Input(
            "max_rank",
            default=TrainConfig.max_rank,
            min=1,
            max=1024,
            tooltip="The most that a layer can learn. Be generous: the training finds out by itself how much of it is "
            "used, and what is not used can be cut off.",
        ),
        io.Combo.Input(
            "layers",
            options=list(get_args(LayerPreset)),
            default=TrainConfig.layers,
            tooltip="Which layers learn. More layers learn finer detail, make a larger file and forget more.",
        ),
        io.Int.Input(
            "seed",
            default=TrainConfig.seed,
            min=0,
            max=2**63 - 1,
            control_after_generate=io.ControlAfterGenerate.fixed,
            tooltip="Decides the adapter's start, the order of the pictures, the noise and the timesteps. The same "
            "seed gives the same style again.",
        ),
    ]


def _outputs() -> list[Any]:
    return [
        io.Model.Output(display_name="model", tooltip="The model with the style in it, ready for a KSampler."),
        io.LoraModel.Output(
            display_name="lora_model",
            tooltip="The adapter alone, for Save AC-LoRA, Inspect AC-LoRA and Resize AC-LoRA.",
        ),
        io.LossMap.Output(display_name="loss_map", tooltip="The loss of every step, for ComfyUI's Plot Loss Graph."),
        io.Custom("RANK_REPORT").Output(
            display_name="rank_report",
            tooltip="What the training found out: settings, losses, and the ranks at every restart.",
        ),
        io.Clip.Output(
            display_name="clip",
            tooltip="The text encoder with what it learned. Only with AC-LoRA Text Encoder Options; without, connect "
            "the loader's clip.",
        ),
    ]
