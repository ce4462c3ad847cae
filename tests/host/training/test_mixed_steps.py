"""A step over captions of different lengths: its gradient is the mean of the single images' gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.support.families import FAMILIES, build, caption

TOKENS = (8, 12, 12, 20)  # the networks below repeat no caption to another's length
NAMES = ("SD3", "Flux.1", "Chroma", "Lumina 2", "Qwen-Image", "Wan 2.1")


def opened(pack: Any, family: Any) -> Any:
    """Open the model for training, with one image for each caption."""
    generator = torch.Generator().manual_seed(3)
    with torch.inference_mode():
        latents = [{"samples": torch.randn(1, *family.latent, generator=generator)} for _ in TOKENS]
        captions = [caption(family, generator, tokens) for tokens in TOKENS]
    return pack.nodes.host.training(build(family), latents, captions)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_a_mixed_step_is_the_mean_over_its_images(pack: Any, name: str) -> None:
    core = pack.aclora_core
    config = core.config.train_config.TrainConfig(batch_size=4, max_rank=2, alpha=2.0, mode="off", layers="all")
    with torch.inference_mode(), opened(pack, FAMILIES[name]) as model:
        progress = core.training.progress.Progress(1)
        work = core.training.trainer.TrainingPass(model, config, range(len(TOKENS)), 1.0, progress, 1)
        with torch.no_grad():  # with lora_up at zero, half of the gradients would be zero
            work.weights.master.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
        work.weights.refresh()
        with work.attached():
            step = work._drawing.next_step()
            assert len({batch.key[0] for batch in step.batches}) == 3
            together = gradient(work, step.batches)
            rows = [alone(core, model, batch, len(TOKENS)) for batch in step.batches]
            single = gradient(work, itertools.chain(*rows))
    assert together.abs().max() > 1e-4
    torch.testing.assert_close(together, single, rtol=1e-3, atol=1e-5 * float(single.abs().max()))


def gradient(work: Any, batches: Any) -> torch.Tensor:
    work.weights.gradient.zero_()
    for batch in batches:
        work._loss(batch)[0].backward()
    return work.weights.gradient.clone()


def alone(core: Any, model: Any, batch: Any, count: int) -> list[Any]:
    """Split a batch into single images with the same noise, each with weight 1 / count."""
    known = list(enumerate(model.latents))
    numbers = [next(n for n, own in known if torch.equal(own, row)) for row in batch.latents.split(1)]
    rows = zip(numbers, batch.noise.split(1), batch.sigma.split(1), strict=True)
    return [core.training.batches.make_batch(model, [n], noise, sigma, 1 / count) for n, noise, sigma in rows]
