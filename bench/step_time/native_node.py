"""Train with ComfyUI's own training node, timed through its progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bench.step_time.clock import Clock
from bench.step_time.models import Case, build_model, random_dataset

# Settings that differ from the node's defaults. Gradient checkpointing is on by default.
MODES: dict[str, dict[str, Any]] = {
    "native, defaults": {},
    "native, checkpointing off": {"gradient_checkpointing": False},
    "native, bypass mode": {"gradient_checkpointing": False, "bypass_mode": True},
}


def training(case: Case, batch: int, mode: dict[str, Any], model: Any = None) -> Callable[[Clock], None]:
    """Return a function that runs TrainLoraNode as ComfyUI does: every input a list, in inference mode.

    Args:
        model: the MODEL; None lets the node load one on the GPU.
    """

    def run(clock: Clock) -> None:
        import comfy.utils
        import comfy_extras.nodes_train as nodes_train

        latents, captions = random_dataset(case)
        settings = _defaults(nodes_train.TrainLoraNode) | {
            "batch_size": batch,
            "rank": 16,
            "optimizer": "AdamW",
            "steps": clock.total,
            **mode,
        }
        if clock.device.type == "cpu":
            settings["training_dtype"] = settings["lora_dtype"] = "fp32"  # as the model on a CPU
        comfy.utils.set_progress_bar_enabled(False)
        with torch.inference_mode():
            # The node trains a reloaded copy, and ComfyUI keeps the first in main memory: an empty model replaces it.
            trained = build_model(case, weights=False) if model is None else model
            with _ticking(nodes_train, clock):
                clock.start()
                nodes_train.TrainLoraNode.execute(
                    model=[trained],
                    latents=latents,
                    positive=captions,
                    **{name: [value] for name, value in settings.items()},
                )

    return run


def _defaults(node: Any) -> dict[str, Any]:
    """Return the default values of the node's widgets."""
    widgets = node.define_schema().inputs[3:]  # after model, latents and positive
    return {widget.id: widget.default for widget in widgets}


@contextmanager
def _ticking(nodes_train: Any, clock: Clock) -> Iterator[None]:
    """Replace the node's progress bar, which it updates once a step; ComfyUI's global hook misses some updates."""

    class Bar:
        def __init__(self, total: int) -> None:
            pass

        def update(self, value: int) -> None:
            clock.tick()

    before = nodes_train.ProgressBar
    nodes_train.ProgressBar = Bar
    try:
        yield
    finally:
        nodes_train.ProgressBar = before
