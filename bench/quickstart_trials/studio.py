"""The tiny base with the pack's training, and the drawing of prompts with what was trained."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.quickstart_trials.trials import Drawing, Trial
from bench.training_session import Session, make_config, training_session
from launcher.inprocess import load_pack, open_host
from tools.tiny_base import icons
from tools.tiny_base.example_pictures import STYLE

DRAWING_STEPS = 20
_NOISE_SEED = 11_000  # of the first drawing; no training uses it
_BATCH = 8  # drawings at once


@dataclass(frozen=True)
class Host:
    """The pack in ComfyUI, and its tiny base."""

    pack: ModuleType
    model: Any
    clip: Any
    vae: Any

    def core(self, name: str) -> ModuleType:
        """Return a module of the pack's core."""
        return importlib.import_module(f"{self.pack.__name__}.aclora_core.{name}")

    def encode(self, text: str) -> Any:
        """Return ComfyUI's conditioning of a text."""
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))


def open_tiny_base(folder: Path) -> Host:
    """Load the pack and its tiny base; folder: ComfyUI's."""
    open_host(folder)
    pack = load_pack()
    with torch.inference_mode():
        return Host(pack, *pack.nodes.tiny_base.ACLoRATinyBase.execute().result)


@dataclass(frozen=True)
class Studio:
    """A trial's images, and the prompts to draw.

    images: how many there are to learn from; the conditionings of the prompts and of the empty one follow theirs.
    """

    host: Host
    session: Session
    images: int
    prompts: int

    def train(self, trial: Trial, seed: int) -> Any:
        """Train with the node's defaults but for the trial's settings, and return the result."""
        config = make_config(self.host.pack, **{**trial.settings, "seed": seed})
        indices = list(range(self.images))
        return self.host.core("training").train(self.session.network, self.session.images, config, indices=indices)

    def draw(self, adapter: Any | None, drawing: Drawing) -> Tensor:
        """Draw all prompts, always from the same noise; (n, h, w, 3) in 0..1. Without an adapter the base draws."""
        with self._injected(adapter, drawing.strength):
            latents = torch.cat([self._latents(part, drawing.guidance) for part in _parts(self.prompts)])
        with torch.inference_mode():
            pixels = self.host.vae.decode(self.session.network.base.process_latent_out(latents.clone()))
        return pixels.float().clamp(0, 1).clone().cpu()

    def _injected(self, adapter: Any | None, strength: float) -> Any:
        if adapter is None:
            return nullcontext()
        network, lora = self.session.network, self.host.core("lora")
        layers = {name: replace(layer, alpha=layer.alpha * strength) for name, layer in adapter.layers.items()}
        weights = lora.FlatParameters(layers, network.device, network.dtype)
        targets = self.host.core("lora.targets").preset_layers(network.network, "all", network.prefix)
        return lora.injected(targets, weights.layers, network.is_unpatched)

    def _latents(self, part: range, guidance: float) -> Tensor:
        network = self.session.network
        if guidance != 1:
            network = Guided(network, self._conditioning([self.images + self.prompts] * len(part)), guidance)
        shape = self.session.images.latents[0].shape
        seeds = [_NOISE_SEED + number for number in part]
        noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        conditioning = self._conditioning([self.images + number for number in part])
        return self.host.core("diffusion").draw_latents(network, noise, conditioning, DRAWING_STEPS)

    def _conditioning(self, indices: Sequence[int]) -> Any:
        return self.host.core("storage").to_device(
            self.session.images.conditioning(indices), self.session.network.device
        )


class Guided:
    """A network with classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598), as KSampler's cfg.

    Args:
        network: the pack's DiffusionModel.
        empty: the conditioning of the empty caption, as often as images are drawn at once.
        guidance: weight of the conditional prediction; 1 for none.
    """

    def __init__(self, network: Any, empty: Any, guidance: float) -> None:
        self.network, self.empty, self.guidance = network, empty, guidance
        self.objective, self.device = network.objective, network.device

    def denoise(self, noisy: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
        """Return the guided prediction of the clean latents."""
        conditional = self.network.denoise(noisy, sigma, conditioning).float()
        without = self.network.denoise(noisy, sigma, self.empty).float()
        return without + self.guidance * (conditional - without)


@contextmanager
def opened(host: Host, cache: Path, trial: Trial, prompts: Sequence[str]) -> Iterator[Studio]:
    """Open the tiny base with a trial's images, to draw the prompts."""
    drawn = icons.load_set(cache, STYLE)
    pixels = torch.from_numpy(np.stack([icons.render(drawn[concept]) for concept in trial.concepts])).float() / 255
    texts = [*trial.captions(trial.concepts), *prompts, ""]
    with torch.inference_mode():
        encoded = [{"samples": sample.clone()} for sample in host.vae.encode(pixels).split(1)]
        unused = {"samples": torch.zeros_like(encoded[0]["samples"])}  # prompts have no image
        latents = [*encoded, *[unused] * (len(prompts) + 1)]
        conditioning = [host.encode(text) for text in texts]
        with training_session(host.pack, host.model, latents, conditioning, host.encode("")) as session:
            yield Studio(host, session, len(pixels), len(prompts))


def _parts(count: int) -> list[range]:
    return [range(first, min(first + _BATCH, count)) for first in range(0, count, _BATCH)]
