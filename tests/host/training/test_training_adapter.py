"""A model that was distilled for few steps is trained with a training adapter on it, and drawn with without it."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from tests.support import tiny_base as tiny
from tests.support.tiny_base import denoising_loss, first_step, trained, untouched

# Fixtures: the tiny base and two images.
parts, model, pictures = tiny.parts, tiny.model, tiny.pictures


@pytest.fixture
def training_adapter(pack: Any, model: Any, pictures: Any) -> dict[str, torch.Tensor]:
    """A LoRA that changes a little of what the model draws, and knows nothing of the images."""
    _, lora, *_ = trained(pack, model, *pictures, steps=1)
    generator = torch.Generator().manual_seed(9)
    return {
        name: torch.randn(tensor.shape, generator=generator) * 0.2 if "lora_up" in name else tensor
        for name, tensor in lora.items()
    }


def with_lora(model: Any, lora: dict[str, torch.Tensor]) -> Any:
    """Return what ComfyUI's Load LoRA Model gives."""
    loader = importlib.import_module("comfy_extras.nodes_train").LoraModelLoader
    with torch.inference_mode():
        return loader.execute(model, lora, 1.0).result[0]


def test_the_lora_works_without_the_training_adapter_that_it_was_trained_beside(
    pack: Any, model: Any, pictures: Any, training_adapter: dict[str, torch.Tensor]
) -> None:
    prepared = with_lora(model, training_adapter)
    with untouched(prepared):
        beside, lora, *_ = trained(pack, prepared, *pictures, steps=30, learning_rate=2e-3, max_rank=8, layers="all")
    alone, both = with_lora(model, lora), with_lora(prepared, lora)
    before, after = (denoising_loss(pack, it, *pictures) for it in (model, alone))
    assert after < 0.7 * before
    caption = pictures[1][0]
    drawn = {name: first_step(it, caption) for name, it in (("node", beside), ("both", both), ("alone", alone))}
    torch.testing.assert_close(drawn["node"], drawn["both"], rtol=1e-3, atol=1e-3)  # the node's model has it
    assert (drawn["alone"] - drawn["both"]).norm() > 0.02 * drawn["both"].norm()
