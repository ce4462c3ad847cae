"""The pack's own training, entered as its node enters it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import fields
from types import ModuleType
from typing import Any

import torch

from .clock import Clock
from .models import Case, build, pictures

# What is compared: every layer adapted at one rank, a plain LoRA, nothing held out.
PLAIN: dict[str, Any] = {"layers": "all", "max_rank": 16, "mode": "off", "held_out": 0.0}


def core(pack: ModuleType) -> ModuleType:
    """The pack's aclora_core.training."""
    return importlib.import_module(f"{pack.__name__}.aclora_core.training")


def unknown(pack: ModuleType, settings: dict[str, Any]) -> list[str]:
    """The settings that this version of the pack does not have."""
    return sorted(set(settings) - {field.name for field in fields(core(pack).TrainConfig)})


def training(pack: ModuleType, case: Case, batch: int, settings: dict[str, Any]) -> Callable[[Clock], None]:
    """A training whose steps the clock counts."""

    def run(clock: Clock) -> None:
        config = core(pack).TrainConfig(**{**PLAIN, "steps": clock.total, "batch_size": batch, **settings})
        latents, captions = pictures(case)
        with torch.inference_mode():  # as the host runs loaders and nodes
            model = build(case)
            clock.start()
            with pack.nodes.host.training(model, latents, captions) as trainable:
                core(pack).train(trainable, config, on_step=lambda progress: clock.tick(progress.losses[-1]))

    return run


def trained(
    pack: ModuleType,
    case: Case,
    settings: dict[str, Any],
    sizes: int = 1,
    should_stop: Callable[[Sequence[float]], bool] = lambda losses: False,
) -> Any:
    """A whole training's result, on pictures of so many sizes; should_stop is asked with the losses so far."""
    config = core(pack).TrainConfig(**{**PLAIN, **settings})
    latents, captions = pictures(case, sizes=sizes)
    losses: list[float] = []
    with torch.inference_mode():
        with pack.nodes.host.training(build(case), latents, captions) as trainable:
            return core(pack).train(
                trainable,
                config,
                on_step=lambda progress: losses.append(progress.losses[-1]),
                should_stop=lambda: should_stop(losses),
            )
