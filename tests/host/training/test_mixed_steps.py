"""A step over captions of different lengths: its gradient is the mean of the single images' gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.support.families import FAMILIES, build, caption
from tests.support.gradients import gradient

TOKENS = (8, 12, 12, 20)  # the networks below repeat no caption to another's length
NAMES = ("SD3", "Flux.1", "Chroma", "Lumina 2", "Qwen-Image", "Wan 2.1")


def opened(pack: Any, family: Any) -> Any:
    """Open the model for training, with one image for each caption."""
    generator = torch.Generator().manual_seed(3)
    with torch.inference_mode():
        latents = [{"samples": torch.randn(1, *family.latent, generator=generator)} for _ in TOKENS]
        captions = [caption(family, generator, tokens) for tokens in TOKENS]
    return pack.nodes.host.training_session(build(family), latents, captions)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_a_mixed_step_is_the_mean_over_its_images(pack: Any, name: str) -> None:
    core = pack.aclora_core
    config = core.config.train_config.TrainConfig(batch_size=4, max_rank=2, alpha=2.0, mode="off", layers="all")
    with torch.inference_mode(), opened(pack, FAMILIES[name]) as (model, images):
        progress = core.training.progress.Progress(1)
        trainer = core.training.trainer.Trainer(model, images, config, range(len(TOKENS)), progress, 1)
        parameters = trainer.adapted.parameters
        with torch.no_grad():  # with lora_up at zero, half of the gradients would be zero
            parameters.master.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
        parameters.refresh()
        with trainer.ready():
            step = trainer.stream.next_step()
            assert len({batch.key[0] for batch in step.batches}) == 3
            together = gradient(trainer, step.batches)
            rows = [alone(core, images, batch, len(TOKENS)) for batch in step.batches]
            single = gradient(trainer, itertools.chain(*rows))
    assert together.abs().max() > 1e-4
    torch.testing.assert_close(together, single, rtol=1e-3, atol=1e-5 * float(single.abs().max()))


def alone(core: Any, images: Any, batch: Any, count: int) -> list[Any]:
    """Split a batch into single images with the same noise, each with weight 1 / count."""
    known = list(enumerate(images.latents))
    numbers = [next(n for n, own in known if torch.equal(own, row)) for row in batch.latents.split(1)]
    rows = zip(numbers, batch.noise.split(1), batch.sigma.split(1), strict=True)
    return [core.training.batches.make_batch(images, [n], noise, sigma, 1 / count) for n, noise, sigma in rows]
