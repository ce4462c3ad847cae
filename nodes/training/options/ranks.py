"""The options node for restarts, the rank control of AC-LoRA's paper."""

from __future__ import annotations

from typing import Any, get_args

from comfy_api.latest import io

from ....aclora_core.config import Measure, RestartMode, Threshold, TrainConfig
from .options import Options, options_schema, settings_output


class ACLoRARankOptions(io.ComfyNode):
    """AC-LoRA Rank Options: restarts and their thresholds."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return options_schema(
            node_id="ACLoRARankOptions",
            name="AC-LoRA Rank Options",
            description="Switches on the restarts of the AC-LoRA paper: during the training, what is only noise in "
            "each layer is replaced by new random values.",
            inputs=[*_restarts(), *_thresholds()],
            search_aliases=["rank control", "restart", "svd threshold", "noise floor", "alpha", "plain lora"],
        )

    @classmethod
    def execute(cls, options: Options | None = None, **settings: Any) -> io.NodeOutput:
        TrainConfig(**settings)
        return settings_output(options, settings)


def _restarts() -> list[Any]:
    return [
        io.Combo.Input(
            "mode",
            options=list(get_args(RestartMode)),
            default="paper",  # connecting this node means that restarts are wanted
            tooltip="How a restart replaces noise. paper: in each of a layer's two matrices, as published. product: "
            "noise in their product is removed. product_redraw: it is replaced by new random values. off: no "
            "restarts, as without this node. In our tests, images without restarts were as good as with rare ones.",
        ),
        io.Int.Input(
            "restart_every",
            default=TrainConfig.restart_every,
            min=1,
            max=10_000,
            tooltip="Epochs between two restarts; one epoch shows every image once. A smaller number restarts more "
            "often. In our tests, restarts every 40 steps made the images worse; one restart after about 320 steps "
            "did not.",
        ),
        io.Boolean.Input(
            "clear_moments",
            default=TrainConfig.clear_moments,
            tooltip="Whether a restart also resets the optimizer state (moments) of the weights that it replaces. "
            "Best left on.",
        ),
        io.Float.Input(
            "alpha",
            default=TrainConfig.alpha,
            min=0.01,
            max=1024.0,
            step=0.5,
            tooltip="Strength of the LoRA during training: its scale is alpha divided by the rank. A larger value "
            "learns faster. There is no need to change it with max_rank.",
        ),
    ]


def _thresholds() -> list[Any]:
    return [
        io.Combo.Input(
            "threshold",
            options=list(get_args(Threshold)),
            default=TrainConfig.threshold,
            tooltip="How a restart tells signal (what was learned) from noise. dynamic: by the loss, as published. "
            "fixed: a fixed fraction. noise floor: what stands out from a random matrix; it keeps less, and images "
            "were worse than with dynamic. scheduled: a fraction that rises over the training.",
        ),
        io.Float.Input(
            "fixed_threshold",
            default=TrainConfig.fixed_threshold,
            min=0.01,
            max=1.0,
            step=0.01,
            tooltip="The fraction of a layer that counts as signal, for the fixed threshold.",
        ),
        io.Float.Input(
            "lowest_threshold",
            default=TrainConfig.lowest_threshold,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Lower bound of the dynamic threshold, the fraction of a layer that counts as signal; the "
            "scheduled threshold starts here. A larger bound keeps more.",
        ),
        io.Float.Input(
            "highest_threshold",
            default=TrainConfig.highest_threshold,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Upper bound of the dynamic threshold; the scheduled one ends here. A smaller bound replaces more.",
        ),
        io.Combo.Input(
            "measure",
            options=list(get_args(Measure)),
            default=TrainConfig.measure,
            tooltip="What the threshold is a fraction of: the sum of the squared singular values (energy) or of the "
            "singular values (sum). sum counts less as noise.",
        ),
        io.Int.Input(
            "restart_steps",
            default=TrainConfig.restart_steps,
            min=0,
            max=100_000,
            optional=True,
            advanced=True,
            tooltip="Steps between two restarts, instead of restart_every, whatever the number of images. 0: "
            "restart_every applies.",
        ),
    ]
