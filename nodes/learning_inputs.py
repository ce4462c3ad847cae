"""The inputs of the training node that are about how the steps learn, and which layers."""

from __future__ import annotations

from typing import Any, get_args

from comfy_api.latest import io

from ..aclora_core.config import TrainConfig
from ..aclora_core.objective import LossWeight, Timesteps
from ..aclora_core.optimizers import Name
from ..aclora_core.schedule import Schedule


def inputs() -> list[Any]:
    """Optional, so that graphs from before they came still run."""
    return [*_steps(), *_noise(), *_layers()]


def _steps() -> list[Any]:
    return [
        io.Combo.Input(
            "optimizer", options=list(get_args(Name)), default=TrainConfig.optimizer, optional=True, advanced=True,
            tooltip="How steps are made of gradients. AdamW suits. Adafactor and AdamW8bit need less memory. SGD needs "
            "a learning rate some 1000 times larger. Prodigy finds it by itself: set learning_rate to 1. The last "
            "three need a Python package each; a message says which.",
        ),
        io.Combo.Input(
            "schedule", options=list(get_args(Schedule)), default=TrainConfig.schedule, optional=True, advanced=True,
            tooltip="Whether the learning rate stays, or falls to almost nothing over all steps, along a cosine or a "
            "line.",
        ),
        io.Int.Input(
            "warm_up", default=TrainConfig.warm_up, min=0, max=100_000, optional=True, advanced=True,
            tooltip="Steps in which the learning rate grows to its value. Larger is gentler at the start.",
        ),
        io.Int.Input(
            "accumulate", default=TrainConfig.accumulate, min=1, max=1024, optional=True, advanced=True,
            tooltip="Batches that one step learns from. Larger is as a larger batch_size, without its memory, and a "
            "step takes so many times as long.",
        ),
        io.Float.Input(
            "ema_decay", default=TrainConfig.ema_decay, min=0.0, max=0.99999, step=0.001, round=False, optional=True,
            advanced=True,
            tooltip="Gives a running average of the adapter over its last steps instead of the last one. Larger "
            "averages over more: 0.99 over some 100 steps. 0 takes the adapter as it is.",
        ),
    ]  # fmt: skip


def _noise() -> list[Any]:
    return [
        io.Combo.Input(
            "timesteps", options=list(get_args(Timesteps)), default=TrainConfig.timesteps, optional=True, advanced=True,
            tooltip="How much noise steps are given. uniform: every amount alike. logit-normal: the middle most often. "
            "shifted: also by the size of the pictures, for flow models such as Flux and SD3. automatic goes by the "
            "model, and the log says how.",
        ),
        io.Combo.Input(
            "loss_weight", options=list(get_args(LossWeight)), default=TrainConfig.loss_weight, optional=True,
            advanced=True,
            tooltip="Which amounts of noise count more. none: all alike. min-SNR: little noise counts less. debiased: "
            "much noise counts more. The loss that is shown stays the same kind of number.",
        ),
        io.Float.Input(
            "min_snr_gamma", default=TrainConfig.min_snr_gamma, min=0.01, max=1000.0, step=0.5, optional=True,
            advanced=True, tooltip="For min-SNR: larger lets little noise count more. 5 is usual.",
        ),
    ]  # fmt: skip


def _layers() -> list[Any]:
    return [
        io.String.Input(
            "include_layers", default=TrainConfig.include_layers, multiline=True, optional=True, advanced=True,
            tooltip="Of the layers chosen above only those with one of these lines in their name: a part of the name, "
            "such as double_blocks.7. or a regular expression. Empty takes all.",
        ),
        io.String.Input(
            "exclude_layers", default=TrainConfig.exclude_layers, multiline=True, optional=True, advanced=True,
            tooltip="And none of the layers with one of these lines in their name.",
        ),
        io.String.Input(
            "layer_ranks", default=TrainConfig.layer_ranks, multiline=True, optional=True, advanced=True,
            tooltip="Lines such as attn=32: layers with this in their name get this maximum rank instead of max_rank. "
            "Of several lines for a layer the last counts.",
        ),
    ]  # fmt: skip
