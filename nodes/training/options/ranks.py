"""The options node about restarts, which find out the ranks."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ....aclora_core.config import TrainConfig
from .options import Options, check_settings, schema, settings_node


class ACLoRARankOptions(io.ComfyNode):
    """AC-LoRA Rank Options: restarts and their thresholds."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ACLoRARankOptions",
            "AC-LoRA Rank Options",
            "How restarts tell what an adapter has learned from its noise, and what becomes of the noise.",
            [*_restarts(), *_thresholds()],
            ["rank control", "restart", "svd threshold", "noise floor", "alpha", "plain lora"],
        )

    @classmethod
    def validate_inputs(
        cls, lowest_threshold: float | None = None, highest_threshold: float | None = None
    ) -> bool | str:
        return check_settings(lowest_threshold=lowest_threshold, highest_threshold=highest_threshold)

    @classmethod
    def execute(cls, options: Options | None = None, **settings: Any) -> io.NodeOutput:
        return settings_node(options, settings)


def _restarts() -> list[Any]:
    return [
        io.Combo.Input(
            "mode",
            options=["paper", "product", "product_redraw", "off"],
            default=TrainConfig.mode,
            tooltip="How noise in the adapter is replaced at a restart. paper: each matrix by itself, as published. "
            "product: the noise of both together is dropped. product_redraw: it is drawn anew. off: a plain LoRA.",
        ),
        io.Int.Input(
            "restart_every",
            default=TrainConfig.restart_every,
            min=1,
            max=10_000,
            tooltip="Epochs between two restarts; an epoch shows every picture once. Smaller restarts more often.",
        ),
        io.Boolean.Input(
            "clear_moments",
            default=TrainConfig.clear_moments,
            tooltip="Whether the optimizer forgets what it knew of weights that were drawn anew. On suits best.",
        ),
        io.Float.Input(
            "alpha",
            default=TrainConfig.alpha,
            min=0.01,
            max=1024.0,
            step=0.5,
            tooltip="Strength of the adapter while it learns; its scale is alpha divided by the rank. Larger learns "
            "faster. It need not follow the maximum rank.",
        ),
    ]


def _thresholds() -> list[Any]:
    return [
        io.Combo.Input(
            "threshold",
            options=["dynamic", "fixed", "noise floor"],
            default=TrainConfig.threshold,
            tooltip="How a restart tells signal from noise. dynamic: by the loss, as published. fixed: a set share. "
            "noise floor: by what random numbers alone would look like.",
        ),
        io.Float.Input(
            "fixed_threshold",
            default=TrainConfig.fixed_threshold,
            min=0.01,
            max=1.0,
            step=0.01,
            tooltip="The share of an adapter that counts as signal, for the fixed threshold.",
        ),
        io.Float.Input(
            "lowest_threshold",
            default=TrainConfig.lowest_threshold,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="The dynamic threshold, the share of an adapter that is signal, is never below this. Larger keeps "
            "more.",
        ),
        io.Float.Input(
            "highest_threshold",
            default=TrainConfig.highest_threshold,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="The dynamic threshold is never above this. Smaller redraws more.",
        ),
        io.Combo.Input(
            "measure",
            options=["energy", "sum"],
            default=TrainConfig.measure,
            tooltip="What the threshold is a share of: the squared singular values (energy) or the values (sum). sum "
            "counts more components as noise.",
        ),
    ]
