"""The host's own training node, timed through its progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bench.step_time.clock import Clock
from bench.step_time.models import Case, build, pictures

# What differs from the node's defaults. Checkpointing is on by default.
MODES: dict[str, dict[str, Any]] = {
    "native, defaults": {},
    "native, checkpointing off": {"gradient_checkpointing": False},
    "native, bypass mode": {"gradient_checkpointing": False, "bypass_mode": True},
}


def training(case: Case, batch: int, mode: dict[str, Any]) -> Callable[[Clock], None]:
    """A run of TrainLoraNode as the host calls it: every input a list, under inference mode."""

    def run(clock: Clock) -> None:
        import comfy.utils
        import comfy_extras.nodes_train as nodes_train

        latents, captions = pictures(case)
        settings = _defaults(nodes_train.TrainLoraNode) | {
            "batch_size": batch,
            "rank": 16,
            "optimizer": "AdamW",
            "steps": clock.total,
            **mode,
        }
        if clock.device.type == "cpu":
            settings["training_dtype"] = settings["lora_dtype"] = "fp32"  # as the model there
        comfy.utils.set_progress_bar_enabled(False)
        with torch.inference_mode():
            # The node trains a second copy, and the host keeps the first in main memory: a husk stands for that one.
            husk = build(case, weights=False)
            with _ticking(nodes_train, clock):
                clock.start()
                nodes_train.TrainLoraNode.execute(
                    model=[husk],
                    latents=latents,
                    positive=captions,
                    **{name: [value] for name, value in settings.items()},
                )

    return run


def _defaults(node: Any) -> dict[str, Any]:
    """The node's widgets as they stand when it is placed."""
    widgets = node.define_schema().inputs[3:]  # behind model, latents and positive
    return {widget.id: widget.default for widget in widgets}


@contextmanager
def _ticking(nodes_train: Any, clock: Clock) -> Iterator[None]:
    """The node moves its bar once a step. The host's global hook is not told of every move, so the bar is replaced."""

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
