"""The options node about how steps learn, and from how much noise."""

from __future__ import annotations

from typing import Any, get_args

from comfy_api.latest import io

from ....aclora_core.config import LossWeighting, OptimizerName, Schedule, Timesteps, TrainConfig
from .options import Options, schema, settings_node


class ACLoRALearningOptions(io.ComfyNode):
    """AC-LoRA Learning Options: optimizer, schedule, loss weighting."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ACLoRALearningOptions",
            "AC-LoRA Learning Options",
            "How the steps of a training learn: the optimizer, its learning rate over time, and how much noise "
            "the steps are given.",
            [*_steps(), *_noise(), *_masks()],
            [
                "optimizer",
                "scheduler",
                "prodigy",
                "ema",
                "min snr",
                "timestep sampling",
                "gradient accumulation",
                "masked loss",
            ],
        )

    @classmethod
    def execute(cls, options: Options | None = None, **settings: Any) -> io.NodeOutput:
        return settings_node(options, settings)


def _steps() -> list[Any]:
    return [
        io.Combo.Input(
            "optimizer",
            options=list(get_args(OptimizerName)),
            default=TrainConfig.optimizer,
            tooltip="How steps are made of gradients. AdamW suits. Adafactor and AdamW8bit need less memory. SGD needs "
            "a learning rate some 1000 times larger. Prodigy finds it by itself: set learning_rate to 1. The last "
            "three need a Python package each; a message says which.",
        ),
        io.Combo.Input(
            "schedule",
            options=list(get_args(Schedule)),
            default=TrainConfig.schedule,
            tooltip="Whether the learning rate stays, or falls to almost nothing over all steps, along a cosine or a "
            "line.",
        ),
        io.Int.Input(
            "warm_up",
            default=TrainConfig.warm_up,
            min=0,
            max=100_000,
            tooltip="Steps in which the learning rate grows to its value. Larger is gentler at the start.",
        ),
        io.Int.Input(
            "accumulate",
            default=TrainConfig.accumulate,
            min=1,
            max=1024,
            tooltip="Batches that one step learns from. Larger is as a larger batch_size, without its memory, and a "
            "step takes so many times as long.",
        ),
        io.Float.Input(
            "ema_decay",
            default=TrainConfig.ema_decay,
            min=0.0,
            max=0.99999,
            step=0.001,
            round=False,
            tooltip="Gives a running average of the adapter over its last steps instead of the last one. Larger "
            "averages over more: 0.99 over some 100 steps. 0 takes the adapter as it is.",
        ),
        io.Float.Input(
            "weight_decay",
            default=TrainConfig.weight_decay,
            min=0.0,
            max=10.0,
            step=0.001,
            tooltip="Pulls the adapter's weights towards zero at every step. Larger keeps the style weaker.",
        ),
        io.Float.Input(
            "max_norm",
            default=TrainConfig.max_norm,
            min=0.001,
            max=1000.0,
            step=0.1,
            tooltip="Gradients longer than this are shortened to it, so that one odd batch cannot spoil the adapter.",
        ),
    ]


def _noise() -> list[Any]:
    return [
        io.Combo.Input(
            "timesteps",
            options=list(get_args(Timesteps)),
            default=TrainConfig.timesteps,
            tooltip="How much noise steps are given. uniform: every amount alike. logit-normal: the middle most often. "
            "shifted: also by the size of the pictures, for flow models such as Flux and SD3. automatic goes by the "
            "model, and the log says how.",
        ),
        io.Combo.Input(
            "loss_weight",
            options=list(get_args(LossWeighting)),
            default=TrainConfig.loss_weight,
            tooltip="Which amounts of noise count more. none: all alike. min-SNR: little noise counts less. debiased: "
            "much noise counts more. The loss that is shown stays the same kind of number.",
        ),
        io.Float.Input(
            "min_snr_gamma",
            default=TrainConfig.min_snr_gamma,
            min=0.01,
            max=1000.0,
            step=0.5,
            tooltip="For min-SNR: larger lets little noise count more. 5 is usual.",
        ),
    ]


def _masks() -> list[Any]:
    return [
        io.Float.Input(
            "mask_floor",
            default=TrainConfig.mask_floor,
            min=0.0,
            max=1.0,
            step=0.05,
            optional=True,
            advanced=True,
            tooltip="What the black of a picture's mask counts. 0: nothing, so a watermark under it is never learned. "
            "0.1 lets the background count a little, for backgrounds that come out empty. 1: as if there were no mask.",
        ),
    ]
