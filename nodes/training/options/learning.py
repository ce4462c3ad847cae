"""The options node for the optimizer, the schedule, noise levels and loss weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

from comfy_api.latest import io

from ....aclora_core.config import LossWeighting, OptimizerName, Preset, Schedule, Timesteps, TrainConfig
from .options import Options, options_schema, settings_output


class ACLoRALearningOptions(io.ComfyNode):
    """AC-LoRA Learning Options: optimizer, schedule, loss weighting."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return options_schema(
            node_id="ACLoRALearningOptions",
            name="AC-LoRA Learning Options",
            description="How a training learns: the optimizer, the learning rate schedule, the noise levels and their "
            "loss weights.",
            inputs=[*_steps(), *_noise(), *_optional()],
            search_aliases=[
                "optimizer",
                "scheduler",
                "prodigy",
                "ema",
                "min snr",
                "timestep sampling",
                "gradient accumulation",
                "masked loss",
                "caption dropout",
                "prior preservation",
                "stratified sampling",
                "preset",
            ],
        )

    @classmethod
    def execute(
        cls, options: Options | None = None, unconditional: Any = None, preset: Preset = "off", **settings: Any
    ) -> io.NodeOutput:
        options = options or Options()
        if unconditional is not None:
            options = replace(options, unconditional=unconditional)
        if preset != "off":
            options = replace(options, preset=preset)
        return settings_output(options, settings)


def _steps() -> list[Any]:
    return [
        io.Combo.Input(
            "optimizer",
            options=list(get_args(OptimizerName)),
            default=TrainConfig.optimizer,
            tooltip="The optimizer. AdamW is a good choice. Adafactor and AdamW8bit need less memory. SGD needs a "
            "learning rate about 1000 times larger. Prodigy finds its own: set learning_rate to 1. Prodigy, "
            "AdamWScheduleFree and AdamW8bit each need a Python package; a message names it.",
        ),
        io.Combo.Input(
            "schedule",
            options=list(get_args(Schedule)),
            default=TrainConfig.schedule,
            tooltip="Learning rate schedule: constant, or decaying to almost zero over all steps, along a cosine or "
            "linearly.",
        ),
        io.Int.Input(
            "warm_up",
            default=TrainConfig.warm_up,
            min=0,
            max=100_000,
            tooltip="Warm-up: the number of steps over which the learning rate rises to its value. A larger number is "
            "gentler at the start.",
        ),
        io.Int.Input(
            "accumulate",
            default=TrainConfig.accumulate,
            min=1,
            max=1024,
            tooltip="Gradient accumulation: batches per step. Works like a larger batch_size without its memory, but "
            "a step takes that many times as long.",
        ),
        io.Float.Input(
            "ema_decay",
            default=TrainConfig.ema_decay,
            min=0.0,
            max=0.99999,
            step=0.001,
            round=False,
            tooltip="Decay of an exponential moving average (EMA) of the LoRA's weights, which is used instead of the "
            "last step. Larger averages over more steps: 0.99 over about 100. 0 switches it off.",
        ),
        io.Float.Input(
            "weight_decay",
            default=TrainConfig.weight_decay,
            min=0.0,
            max=10.0,
            step=0.001,
            tooltip="Pulls the LoRA's weights towards zero at every step. A larger value keeps the style weaker.",
        ),
        io.Float.Input(
            "max_norm",
            default=TrainConfig.max_norm,
            min=0.001,
            max=1000.0,
            step=0.1,
            tooltip="Gradient clipping: gradients with a larger norm are scaled down to this norm, so that one odd "
            "batch cannot spoil the LoRA.",
        ),
    ]


def _noise() -> list[Any]:
    return [
        io.Combo.Input(
            "timesteps",
            options=list(get_args(Timesteps)),
            default=TrainConfig.timesteps,
            tooltip="How noise levels are drawn. uniform: all equally often. logit-normal: medium levels most often. "
            "shifted: also by the size of the images, for flow models such as Flux and SD3. automatic suits the "
            "model, with more noise for flow models; the log says how.",
        ),
        io.Combo.Input(
            "loss_weight",
            options=list(get_args(LossWeighting)),
            default=TrainConfig.loss_weight,
            tooltip="How noise levels are weighted in the loss. none: all equally. min-SNR: low noise levels count "
            "less. debiased: high noise levels count more. The displayed loss is not weighted.",
        ),
        io.Float.Input(
            "min_snr_gamma",
            default=TrainConfig.min_snr_gamma,
            min=0.01,
            max=1000.0,
            step=0.5,
            tooltip="For min-SNR: with a larger value low noise levels count more. 5 is common.",
        ),
    ]


def _optional() -> list[Any]:
    return [
        io.Float.Input(
            "mask_floor",
            default=TrainConfig.mask_floor,
            min=0.0,
            max=1.0,
            step=0.05,
            optional=True,
            advanced=True,
            tooltip="Weight of the black parts of an image's mask. 0: they are ignored, so a watermark there is never "
            "learned. 0.1 gives them a little weight, for backgrounds that come out empty. 1: as without a mask.",
        ),
        io.Boolean.Input(
            "stratified_timesteps",
            default=TrainConfig.stratified_timesteps,
            optional=True,
            advanced=True,
            tooltip="Stratified sampling: spreads the noise levels of the images of a step evenly, so that steps vary "
            "less. Makes a difference with 2 images per step or more.",
        ),
        io.Float.Input(
            "caption_dropout",
            default=TrainConfig.caption_dropout,
            min=0.0,
            max=1.0,
            step=0.05,
            optional=True,
            advanced=True,
            tooltip="Probability that an image of a step is learned with the empty caption, so that the style also "
            "shows without words. Needs unconditional. 0.1 is common. A larger value learns less from the captions.",
        ),
        io.Float.Input(
            "prior_weight",
            default=TrainConfig.prior_weight,
            min=0.0,
            max=100.0,
            step=0.1,
            optional=True,
            advanced=True,
            tooltip="Prior preservation: how strongly the prediction with the empty caption is held to that of the "
            "model without the style, so that the model keeps what it knows. Needs unconditional, and makes a step "
            "take more than twice as long. 0: off.",
        ),
        io.Conditioning.Input(
            "unconditional",
            optional=True,
            tooltip="The encoded empty caption, for caption_dropout and prior_weight: a CLIP Text Encode with an empty "
            "text, and the clip that is also connected to the dataset node.",
        ),
        io.Float.Input(
            "timestep_shift",
            default=TrainConfig.timestep_shift,
            min=0.01,
            max=100.0,
            step=0.1,
            optional=True,
            advanced=True,
            tooltip="Shifts the noise levels that timesteps draws. Above 1, high noise is drawn more often and "
            "composition and shapes are learned more; below 1, fine detail is. 1: no shift.",
        ),
        io.Combo.Input(
            "preset",
            options=list(get_args(Preset)),
            default="off",
            optional=True,
            tooltip="Sets steps of Train AC-LoRA by the number of images, and learning_rate by the model: for SD1.5, "
            "SDXL, Flux and Z-Image to what is usual in other trainers. automatic counts the images; the others are "
            "for up to 11 (few), up to 25 (usual), and 100 or more (many). Values that you have changed from their "
            "defaults are kept.",
        ),
    ]
