"""Train with the pack, entered as its training node enters it."""

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
from bench.step_time.models import Case, build_model, random_dataset
from bench.training_session import make_config, training_session

# The same work for all that are compared: a plain LoRA of one rank on every layer, without validation, whole.
PLAIN: dict[str, Any] = {
    "layers": "all",
    "max_rank": 16,
    "mode": "off",
    "held_out": 0.0,
    "stop_early": False,
    "smallest": False,
}


WITHOUT = "without"  # key of the optimization to disable; it is no setting of the pack
_KERNEL_USERS = (  # modules that import find_kernels
    "aclora_core.lora.linear",
    "aclora_core.lora.convolution",
    "aclora_core.training.warmup",
    "aclora_core.lora.dense_weight",
    "nodes.host.differentiable_ops",
    "nodes.host.fused_modulation",
)


def core(pack: ModuleType) -> ModuleType:
    """Return the pack's aclora_core."""
    return importlib.import_module(f"{pack.__name__}.aclora_core")


def unknown(pack: ModuleType, settings: dict[str, Any]) -> list[str]:
    """Return the settings that this version of the pack does not have."""
    return sorted(set(settings) - {WITHOUT} - {field.name for field in fields(core(pack).TrainConfig)})


def training(pack: ModuleType, case: Case, batch: int, settings: dict[str, Any]) -> Callable[[Clock], None]:
    """Return a function that trains and ticks the clock at every step."""

    def run(clock: Clock) -> None:
        config = _config(pack, {"steps": clock.total, "batch_size": batch, **settings})
        latents, captions = random_dataset(case)
        with torch.inference_mode():  # as ComfyUI runs loaders and nodes
            model = build_model(case)
            clock.start()
            opened = training_session(pack, model, latents, captions)
            with opened as session, _without(settings.get(WITHOUT), pack, session.network):
                session.train(config, on_step=lambda progress: clock.tick(progress.losses[-1]))

    return run


def _config(pack: ModuleType, settings: dict[str, Any]) -> Any:
    """Return the TrainConfig of a plain LoRA with these settings."""
    known = {name: value for name, value in settings.items() if name != WITHOUT}
    return make_config(pack, **{**PLAIN, **known})


@contextmanager
def _without(name: str | None, pack: ModuleType, network: Any) -> Iterator[None]:
    """Disable one optimization of a network that is used for one training only."""
    if name is None:
        yield
        return
    is_unpatched, norms = network.is_unpatched, torch.nn.GroupNorm
    kernel_users = [importlib.import_module(f"{pack.__name__}.{name}") for name in _KERNEL_USERS]
    shared_inputs = importlib.import_module(f"{pack.__name__}.aclora_core.lora.shared_inputs").SharedInputs
    find_kernels, fuse = kernel_users[0].find_kernels, shared_inputs.fuse
    if name == "kernels":
        network.fusable = type(network.fusable)()
        network.is_unpatched = lambda layer: not isinstance(layer, norms) and is_unpatched(layer)
        for module in kernel_users:
            module.find_kernels = lambda device, dtype, part: None
    elif name == "siblings":
        shared_inputs.fuse = lambda self: None
    elif name == "joint layers":
        network.is_unpatched = lambda layer: isinstance(layer, norms) and is_unpatched(layer)
    elif name == "attention":
        import comfy.ops

        order = getattr(comfy.ops, "SDPA_BACKEND_PRIORITY", [])
        order.sort(key=lambda backend: backend.name != "FLASH_ATTENTION")  # restored when training ends
    try:
        yield
    finally:
        shared_inputs.fuse = fuse
        for module in kernel_users:
            module.find_kernels = find_kernels


@contextmanager
def _occupied_memory(device: torch.device, free_gb: float) -> Iterator[None]:
    """Occupy all GPU memory but free_gb gigabytes; nothing if free_gb is 0."""
    occupied = None
    if free_gb and device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        occupied = torch.empty(int(free - free_gb * 1e9), dtype=torch.uint8, device=device)
    yield
    del occupied


def trained(
    pack: ModuleType,
    case: Case,
    settings: dict[str, Any],
    sizes: int = 1,
    should_stop: Callable[[Sequence[float]], bool] = lambda losses: False,
    checkpoints: Path | None = None,
    preview_every: int = 0,
    free_gb: float = 0.0,
) -> Any:
    """Train to the end and return the pack's Result.

    Args:
        sizes: number of different image sizes in the dataset.
        should_stop: called after every step with the losses so far.
        checkpoints: folder of the checkpoints; a training that was stopped there is resumed.
        preview_every: steps between previews, which ComfyUI's sampler draws; 0 for none.
        free_gb: GPU memory left free beside the model, in GB; 0 for all of it.
    """
    config = _config(pack, settings)
    latents, captions = random_dataset(case, sizes=sizes)
    losses: list[float] = []
    with torch.inference_mode():
        opened = training_session(pack, build_model(case), latents, captions)
        with (
            opened as session,
            _without(settings.get(WITHOUT), pack, session.network),
            _occupied_memory(session.network.device, free_gb),
        ):
            host, parts = pack.nodes.host, core(pack)
            previews = parts.Previews(
                preview_every,
                lambda done: host.sample_previews(session.network, session.images, None, captions[:2], 0, 1.0),
            )
            return session.train(
                config,
                on_step=lambda progress: losses.append(progress.losses[-1]),
                should_stop=lambda: should_stop(losses),
                checkpoints=parts.CheckpointConfig(checkpoints) if checkpoints else None,
                previews=previews if preview_every else None,
            )
