"""The pack's own training, entered as its node enters it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench.step_time.clock import Clock
from bench.step_time.models import Case, build, pictures
from bench.training_session import make_config, training_session

# What is compared: every layer adapted at one rank, a plain LoRA, nothing held out.
PLAIN: dict[str, Any] = {"layers": "all", "max_rank": 16, "mode": "off", "held_out": 0.0}


WITHOUT = "without"  # names a lever that is taken away, which is no setting of the pack
_FINDERS = (
    "aclora_core.lora.linear",
    "aclora_core.lora.convolution",
    "aclora_core.training.trainer",
    "nodes.host.differentiable_ops",
)


def core(pack: ModuleType) -> ModuleType:
    """The pack's aclora_core."""
    return importlib.import_module(f"{pack.__name__}.aclora_core")


def unknown(pack: ModuleType, settings: dict[str, Any]) -> list[str]:
    """The settings that this version of the pack does not have."""
    return sorted(set(settings) - {WITHOUT} - {field.name for field in fields(core(pack).TrainConfig)})


def training(pack: ModuleType, case: Case, batch: int, settings: dict[str, Any]) -> Callable[[Clock], None]:
    """A training whose steps the clock counts."""

    def run(clock: Clock) -> None:
        config = _config(pack, {"steps": clock.total, "batch_size": batch, **settings})
        latents, captions = pictures(case)
        with torch.inference_mode():  # as the host runs loaders and nodes
            model = build(case)
            clock.start()
            opened = training_session(pack, model, latents, captions)
            with opened as session, _without(settings.get(WITHOUT), pack, session.network):
                session.train(config, on_step=lambda progress: clock.tick(progress.losses[-1]))

    return run


def _config(pack: ModuleType, settings: dict[str, Any]) -> Any:
    """A TrainConfig of a plain LoRA with these settings."""
    known = {name: value for name, value in settings.items() if name != WITHOUT}
    return make_config(pack, **{**PLAIN, **known})


@contextmanager
def _without(lever: str | None, pack: ModuleType, trainable: Any) -> Iterator[None]:
    """Makes one model slower; it is thrown away with its training."""
    if lever is None:
        yield
        return
    plain, norms = trainable.is_unpatched, torch.nn.GroupNorm
    finders = [importlib.import_module(f"{pack.__name__}.{name}") for name in _FINDERS]
    siblings = importlib.import_module(f"{pack.__name__}.aclora_core.lora.shared_inputs").SharedInputs
    find_kernels, join = finders[0].find_kernels, siblings.join
    if lever == "kernels":
        trainable.fusable = type(trainable.fusable)()
        trainable.is_unpatched = lambda layer: not isinstance(layer, norms) and plain(layer)
        for module in finders:
            module.find_kernels = lambda device, dtype, part: None
    elif lever == "siblings":
        siblings.join = lambda self: None
    elif lever == "joint layers":
        trainable.is_unpatched = lambda layer: isinstance(layer, norms) and plain(layer)
    elif lever == "attention":
        import comfy.ops

        order = getattr(comfy.ops, "SDPA_BACKEND_PRIORITY", [])
        order.sort(key=lambda backend: backend.name != "FLASH_ATTENTION")  # the host's; put back when training ends
    try:
        yield
    finally:
        siblings.join = join
        for module in finders:
            module.find_kernels = find_kernels


@contextmanager
def _crowded(device: torch.device, room: float) -> Iterator[None]:
    """Takes the GPU's memory, but for so many GB."""
    taken = None
    if room and device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        taken = torch.empty(int(free - room * 1e9), dtype=torch.uint8, device=device)
    yield
    del taken


def trained(
    pack: ModuleType,
    case: Case,
    settings: dict[str, Any],
    sizes: int = 1,
    should_stop: Callable[[Sequence[float]], bool] = lambda losses: False,
    checkpoints: Path | None = None,
    preview_every: int = 0,
    room: float = 0.0,
) -> Any:
    """A whole training's result, on pictures of so many sizes; should_stop is asked with the losses so far.

    checkpoints: a folder for them; a training that stopped there before goes on. preview_every: steps between pictures
    that the host's sampler draws. room: GB that are free on a GPU beside the model; 0 for all that there are.
    """
    config = _config(pack, settings)
    latents, captions = pictures(case, sizes=sizes)
    losses: list[float] = []
    with torch.inference_mode():
        opened = training_session(pack, build(case), latents, captions)
        with (
            opened as session,
            _without(settings.get(WITHOUT), pack, session.network),
            _crowded(session.network.device, room),
        ):
            host, parts = pack.nodes.host, core(pack)
            previews = parts.Previews(
                preview_every, lambda done: host.draw(session.network, None, captions[:2], 0, 1.0)
            )
            return session.train(
                config,
                on_step=lambda progress: losses.append(progress.losses[-1]),
                should_stop=lambda: should_stop(losses),
                checkpoints=parts.CheckpointConfig(checkpoints) if checkpoints else None,
                previews=previews if preview_every else None,
            )
