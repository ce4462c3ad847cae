"""Features of images from the denoiser of every family that ComfyUI knows, each a small random model."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.families import FAMILIES, build
from tests.support.family_models import caption

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_features_that_tell_images_apart(pack: ModuleType, name: str) -> None:
    """The VAE and the CLIP are stand-ins, since the small random models have none."""
    family = FAMILIES[name]

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        colour = pixels.mean((1, 2)).repeat(1, 1 + family.latent[0] // 3)[:, : family.latent[0]]
        return (2 * colour - 1).view(1, -1, *(1 for _ in family.latent[1:])).expand(1, *family.latent).clone()

    empty = caption(family, torch.Generator().manual_seed(2))
    clip = SimpleNamespace(tokenize=lambda text: text, encode_from_tokens_scheduled=lambda tokens: empty)
    done: list[int] = []
    model = build(family)
    with torch.inference_mode():
        features: Any = pack.nodes.host.DenoiserFeatures(model, SimpleNamespace(encode=encode), clip, 64, done.append)
        red, blue = torch.tensor([0.9, 0.1, 0.1]), torch.tensor([0.1, 0.1, 0.9])
        images = [colour.expand(64, 80, 3) for colour in (red, blue, red)]
        rows = features(images)
    assert rows.shape[0] == 3 and rows.dtype == torch.float32 and rows.isfinite().all() and sum(done) == 3
    assert features.name.startswith("denoiser, ")
    torch.testing.assert_close(rows[0], rows[2], rtol=1e-3, atol=1e-3 * rows.abs().max().item())
    assert torch.cosine_similarity(rows[0], rows[1], dim=0) < 0.99
    assert not any(module._forward_hooks for module in model.model.diffusion_model.modules())
