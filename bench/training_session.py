"""Open a training through the pack's own entry points, in today's version of the pack and in 0.3.0."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Session:
    """A MODEL that is open for training, and the function that trains it."""

    network: Any
    images: Any
    train: Callable[..., Any]  # train(config, **callbacks); the keyword arguments are those of the pack's train()


@contextmanager
def training_session(
    pack: ModuleType, model: Any, latents: Any, captions: Any, unconditional: Any = None
) -> Iterator[Session]:
    """Open a MODEL for training as the pack's training node does.

    Args:
        pack: the loaded pack, of today's version or of 0.3.0.
        model: ComfyUI's MODEL.
        latents: ComfyUI's LATENT dicts.
        captions: one conditioning for each latent.
        unconditional: the conditioning of the empty caption, for caption_dropout and prior_weight; 0.3.0 has neither.
    """
    if hasattr(pack.nodes.host, "training_session"):
        opened = _session(pack, model, latents, captions, unconditional)
    else:
        opened = _session_0_3(pack, model, latents, captions)
    with opened as session:
        yield session


def make_config(pack: ModuleType, **settings: Any) -> Any:
    """Return the pack's TrainConfig with these settings."""
    return importlib.import_module(f"{pack.__name__}.aclora_core.config").TrainConfig(**settings)


@contextmanager
def _session(pack: ModuleType, model: Any, latents: Any, captions: Any, unconditional: Any) -> Iterator[Session]:
    core = importlib.import_module(f"{pack.__name__}.aclora_core")
    more = {} if unconditional is None else {"unconditional": unconditional}  # versions before it take none
    with pack.nodes.host.training_session(model, latents, captions, **more) as (network, images):
        yield Session(network, images, lambda config, **rest: core.train(network, images, config, **rest))


@contextmanager
def _session_0_3(pack: ModuleType, model: Any, latents: Any, captions: Any) -> Iterator[Session]:
    """Version 0.3.0, in which one object holds the network and the images."""
    core = importlib.import_module(f"{pack.__name__}.aclora_core.training")
    with pack.nodes.host.training(model, latents, captions) as trainable:
        yield Session(trainable, trainable, lambda config, **rest: core.train(trainable, config, **rest))
