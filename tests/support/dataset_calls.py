"""The dataset node with a VAE and a CLIP that count what they encode."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aclora_core.storage.nested import tensors_in


def draw(path: Path, seed: int) -> None:
    """Save an image of 96 × 64 random pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def checked(pack: ModuleType) -> Callable[..., bool | str]:
    """Return the node's check of its inputs, which the host awaits."""
    check = pack.nodes.dataset.node.ACLoRADataset.validate_inputs
    return lambda *inputs, **named: asyncio.run(check(*inputs, **named))


def assert_same(found: Any, expected: Any) -> None:
    """Assert that the tensors of two nested values are equal, bit for bit."""
    torch.testing.assert_close(list(tensors_in(found)), list(tensors_in(expected)), rtol=0, atol=0)


class Calls:
    """A VAE and a CLIP freshly loaded, as after a restart of ComfyUI, and how much they encoded."""

    def __init__(self, pack: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        _, self.clip, self.vae = pack.nodes.tiny_base.ACLoRATinyBase.execute().result
        self.pack, self.patch = pack, monkeypatch
        self.images = self.captions = 0
        vae_encode = self.vae.encode

        def encode(pixels: torch.Tensor) -> torch.Tensor:
            self.images += len(pixels)
            return vae_encode(pixels)

        monkeypatch.setattr(self.vae, "encode", encode)
        self.use(self.clip)

    def use(self, clip: Any) -> None:
        """Use this CLIP from now on."""
        self.clip, clip_encode = clip, clip.encode_from_tokens_scheduled

        def encode_from_tokens_scheduled(tokens: Any) -> Any:
            self.captions += 1
            return clip_encode(tokens)

        self.patch.setattr(clip, "encode_from_tokens_scheduled", encode_from_tokens_scheduled)

    def run(self, trigger: str = "ink", resolution: int = 64, **options: Any) -> Any:
        """Run the node; the counts start at zero."""
        self.images = self.captions = 0
        with torch.inference_mode():  # as the host runs nodes
            node = self.pack.nodes.dataset.node.ACLoRADataset
            return node.execute("kept", self.vae, self.clip, resolution, trigger, **options)

    def encoded(self, **options: Any) -> tuple[int, int]:
        """Return how many images and captions a run had to encode."""
        self.run(**options)
        return self.images, self.captions
