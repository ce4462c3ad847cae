"""Models that do not fit on the GPU: with streamed weights a training is the same, and the MODEL is unchanged."""

from typing import Any

import pytest
import torch

from tests.support.families import FAMILIES, build, pictures
from tests.support.tiny_base import DENOISER, first_step, model, parts, state_of, trained, untouched  # noqa: F401
from tests.support.tiny_base import pictures as tiny_pictures  # noqa: F401
from tests.support.train_node import train

SETTINGS = {"steps": 4, "batch_size": 2, "max_rank": 4, "learning_rate": 1e-3, "layers": "all", "mode": "off"}
SOME = [
    "SD1.5",
    "SDXL",
    "SDXL in fp16",
    "SD3",
    "SD3 in fp8",
    "SD3 in fast fp8",
    "Flux.1",
    "Flux.2",
    "Chroma",
    "Z-Image",
    "Qwen-Image",
    "HiDream",
]


@pytest.fixture
def too_large(pack, monkeypatch) -> None:
    """Let every model be too large for its device."""
    monkeypatch.setattr(pack.nodes.host.loading, "fits", lambda patcher, limits: False)


def weights_of(result: Any) -> dict[str, torch.Tensor]:
    return result[1]


def learned(pack, name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    family = FAMILIES[name]
    base = build(family)
    latents, captions = pictures(family)
    with untouched(base):
        return base, weights_of(train(pack, base, latents, captions, SETTINGS))


@pytest.mark.parametrize("name", SOME)
def test_a_family_learns_the_same_with_streamed_weights(name, pack, request) -> None:
    _, expected = learned(pack, name)
    request.getfixturevalue("too_large")
    _, found = learned(pack, name)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key].float(), value.float(), rtol=1e-2, atol=1e-4)


def test_patches_of_the_model_count(pack, model, tiny_pictures, too_large) -> None:  # noqa: F811
    """A LoRA that is on the MODEL already is part of what is streamed."""
    patched = model.clone()
    name = next(key for key in model.model.state_dict() if key.endswith("qkv.weight"))
    shape = model.model.state_dict()[name].shape
    patched.add_patches({name: (0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(5)),)})
    latents, captions = tiny_pictures
    losses = [list(trained(pack, each, latents, captions)[2]["loss"]) for each in (model, patched)]
    assert losses[0][0] != losses[1][0]
    with untouched(patched):
        trained(pack, patched, latents, captions)
