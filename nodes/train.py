"""The node that trains a style."""

from __future__ import annotations

import math
import time
from typing import Any

from comfy_api.latest import io

from ..aclora_core.adapter_file import to_state_dict
from ..aclora_core.charts import training_chart
from ..aclora_core.config import TrainConfig
from ..aclora_core.report import training_summary
from ..aclora_core.training import Progress, train
from . import checkpoint_folder, host, learning_inputs, live_previews, run_control

_PICTURE_EVERY = 2.0  # seconds between two live charts


class ACLoRATrain(io.ComfyNode):
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
            inputs=[*_links(), *_widgets(), *_advanced(), *_more()],
            outputs=_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, checkpoint_name: list | None = None) -> bool | str:
        return run_control.check_name(checkpoint_name)

    @classmethod
    def fingerprint_inputs(cls, **settings: list) -> int:
        return run_control.state(settings)

    @classmethod
    def execute(cls, model: list, latents: list, conditioning: list, **settings: list) -> io.NodeOutput:
        # Every widget comes as a list of one, since the pictures come as lists.
        values = {name: given[0] for name, given in settings.items()}
        checkpoints, checkpoint_name = run_control.take(values)
        shown = live_previews.LivePreviews(values)
        config = TrainConfig(**values)
        bar = host.Bar(config.steps, host.hidden_node_id(cls))
        with host.training(model[0], latents, conditioning) as trainable:
            previews = shown.drawn_with(trainable, config.seed)
            show = _Show(bar, shown, config.learning_rate)
            result = train(trainable, config, show, trainable.cancelled, checkpoints=checkpoints, previews=previews)
            facts = {"base_model": trainable.base_name, "resolution": trainable.resolution}
            cancelled = trainable.cancelled()
        if cancelled:
            host.accept_cancel()
            checkpoint_folder.note_cancel(checkpoint_name)
        result.report.settings.update(facts)
        lora_model = to_state_dict(result.adapter)
        return io.NodeOutput(
            host.with_adapter(model[0], lora_model), lora_model, {"loss": result.report.losses}, result.report,
            ui={"text": (training_summary(result.report),)},
        )  # fmt: skip


class _Show:
    """Called after every step: moves the bar, and now and then draws the chart. rate: the learning rate as set."""

    def __init__(self, bar: host.Bar, previews: live_previews.LivePreviews, rate: float) -> None:
        self.bar, self.previews, self.rate = bar, previews, rate
        self.drawn = -math.inf

    def __call__(self, progress: Progress) -> None:
        picture = None
        self.bar.total = progress.total
        if time.monotonic() - self.drawn > _PICTURE_EVERY or progress.done == progress.total:
            planned = progress.total - progress.done + len(progress.losses)
            chart = training_chart(progress.losses, planned, progress.restarts, progress.validation)
            picture = self.previews.below(chart)
            self.drawn = time.monotonic()
        if not host.cancelled():  # the host's bar would raise, and the work would be lost
            self.bar.show(progress.done, _line(progress, self.bar, self.rate), picture)


def _line(progress: Progress, bar: host.Bar, rate: float) -> str:
    """What the node says while it trains; the learning rate only where it is not what was set."""
    recent = [loss for loss in progress.losses[-10:] if math.isfinite(loss)]
    parts = [progress.stage, f"loss {sum(recent) / len(recent):.3f}" if recent else "no finite loss"]
    if progress.validation:
        parts.append(f"held-out {progress.validation[-1][1]:.3f}")
    if progress.learning_rate not in (0.0, rate):
        parts.append(f"learning rate {progress.learning_rate:.2g}")
    if progress.resumed_at:
        parts.append(f"resumed at step {progress.resumed_at}")
    line = ", ".join([*parts, bar.time_left(progress.done, progress.resumed_at)])
    return "\n".join([line, *progress.notes[-1:]])


def _links() -> list[Any]:
    return [
        io.Model.Input("model", tooltip="The model that learns the style. It stays as it is; a copy gets the style."),
        io.Latent.Input("latents", tooltip="The pictures, as the dataset node or a VAE Encode gives them."),
        io.Conditioning.Input(
            "conditioning", tooltip="The caption of each picture, in the order of the latents; as many as pictures."
        ),
    ]


def _widgets() -> list[Any]:
    return [
        io.Int.Input(
            "steps", default=TrainConfig.steps, min=1, max=100_000,
            tooltip="How often the adapter is changed, at most. With eight pictures or more some are held out, and "
            "training stops by itself once more steps only copy the pictures instead of the style.",
        ),
        io.Float.Input(
            "learning_rate", default=TrainConfig.learning_rate, min=1e-7, max=10.0, step=1e-5, round=False,
            tooltip="How far each step goes. Larger learns faster and forgets more of the model; smaller is gentler "
            "and needs more steps.",
        ),
        io.Int.Input(
            "batch_size", default=TrainConfig.batch_size, min=1, max=256,
            tooltip="Pictures in one step. Larger is steadier and takes more memory and time a step.",
        ),
        io.Int.Input(
            "max_rank", default=TrainConfig.max_rank, min=1, max=1024,
            tooltip="The most that a layer can learn. Be generous: the training finds out by itself how much of it is "
            "used, and what is not used can be cut off.",
        ),
        io.Int.Input(
            "seed", default=TrainConfig.seed, min=0, max=2**63 - 1,
            control_after_generate=io.ControlAfterGenerate.fixed,
            tooltip="Decides the adapter's start, the order of the pictures, the noise and the timesteps. The same "
            "seed gives the same style again.",
        ),
    ]  # fmt: skip


def _advanced() -> list[Any]:
    return [
        io.Float.Input(
            "alpha", default=TrainConfig.alpha, min=0.01, max=1024.0, step=0.5, advanced=True,
            tooltip="Strength of the adapter while it learns; its scale is alpha divided by the rank. Larger learns "
            "faster. It need not follow the maximum rank.",
        ),
        io.Combo.Input(
            "layers", options=["attention", "attention and feed-forward", "all"], default=TrainConfig.layers,
            advanced=True,
            tooltip="Which layers learn. More layers learn finer detail, make a larger file and forget more.",
        ),
        io.Combo.Input(
            "mode", options=["paper", "product", "product_redraw", "off"], default=TrainConfig.mode, advanced=True,
            tooltip="How noise in the adapter is replaced at a restart. paper: each matrix by itself, as published. "
            "product: the noise of both together is dropped. product_redraw: it is drawn anew. off: a plain LoRA.",
        ),
        io.Combo.Input(
            "measure", options=["energy", "sum"], default=TrainConfig.measure, advanced=True,
            tooltip="What the threshold is a share of: the squared singular values (energy) or the values (sum). sum "
            "counts more components as noise.",
        ),
        io.Int.Input(
            "restart_every", default=TrainConfig.restart_every, min=1, max=10_000, advanced=True,
            tooltip="Epochs between two restarts; an epoch shows every picture once. Smaller restarts more often.",
        ),
        io.Float.Input(
            "lowest_threshold", default=TrainConfig.lowest_threshold, min=0.0, max=1.0, step=0.01, advanced=True,
            tooltip="The dynamic threshold, the share of an adapter that is signal, is never below this. Larger keeps "
            "more.",
        ),
        io.Float.Input(
            "highest_threshold", default=TrainConfig.highest_threshold, min=0.0, max=1.0, step=0.01, advanced=True,
            tooltip="The dynamic threshold is never above this. Smaller redraws more.",
        ),
        io.Boolean.Input(
            "clear_moments", default=TrainConfig.clear_moments, advanced=True,
            tooltip="Whether the optimizer forgets what it knew of weights that were drawn anew. On suits best.",
        ),
        io.Float.Input(
            "weight_decay", default=TrainConfig.weight_decay, min=0.0, max=10.0, step=0.001, advanced=True,
            tooltip="Pulls the adapter's weights towards zero at every step. Larger keeps the style weaker.",
        ),
        io.Float.Input(
            "max_norm", default=TrainConfig.max_norm, min=0.001, max=1000.0, step=0.1, advanced=True,
            tooltip="Gradients longer than this are shortened to it, so that one odd batch cannot spoil the adapter.",
        ),
        io.Combo.Input(
            "threshold", options=["dynamic", "fixed", "noise floor"], default=TrainConfig.threshold,
            optional=True, advanced=True,
            tooltip="How a restart tells signal from noise. dynamic: by the loss, as published. fixed: a set share. "
            "noise floor: by what random numbers alone would look like.",
        ),
        io.Float.Input(
            "fixed_threshold", default=TrainConfig.fixed_threshold, min=0.01, max=1.0, step=0.01,
            optional=True, advanced=True,
            tooltip="The share of an adapter that counts as signal, for the fixed threshold.",
        ),
        io.Float.Input(
            "held_out", default=TrainConfig.held_out, min=0.0, max=0.5, step=0.05, optional=True, advanced=True,
            tooltip="Share of the pictures that are set aside, from eight pictures on, to see which step is best. "
            "0 learns from all and takes the last step.",
        ),
        io.Boolean.Input(
            "stop_early", default=TrainConfig.stop_early, optional=True, advanced=True,
            tooltip="Stops when the pictures set aside have only got worse for a while.",
        ),
        io.Boolean.Input(
            "refit", default=TrainConfig.refit, optional=True, advanced=True,
            tooltip="Once the best step is known, trains again up to it with all pictures, those set aside too.",
        ),
        io.Boolean.Input(
            "smallest", default=TrainConfig.smallest, optional=True, advanced=True,
            tooltip="Gives the smallest adapter that is as good as the whole one, by the pictures set aside.",
        ),
        io.Combo.Input(
            "checkpointing", options=["automatic", "all", "off"], default=TrainConfig.checkpointing,
            optional=True, advanced=True,
            tooltip="Computes parts of the model twice instead of keeping them, which needs less memory and a third "
            "more time. automatic: as many parts as it takes for a step to fit.",
        ),
        io.Boolean.Input(
            "graph", default=TrainConfig.graph, optional=True, advanced=True,
            tooltip="Records the steps as CUDA graphs, which is several times faster. Off only to look for a fault.",
        ),
    ]  # fmt: skip


def _more() -> list[Any]:
    return [*learning_inputs.inputs(), *run_control.inputs(), *live_previews.inputs()]


def _outputs() -> list[Any]:
    return [
        io.Model.Output(display_name="model", tooltip="The model with the style in it, ready for a KSampler."),
        io.LoraModel.Output(display_name="lora_model", tooltip="The adapter alone, for AC-LoRA Save and Inspect."),
        io.LossMap.Output(display_name="loss_map", tooltip="The loss of every step, for the host's Plot Loss Graph."),
        io.Custom("RANK_REPORT").Output(
            display_name="rank_report",
            tooltip="What the training found out: settings, losses, and the ranks at every restart.",
        ),
    ]
