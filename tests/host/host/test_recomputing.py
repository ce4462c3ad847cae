"""What only a training on a GPU does before its first step, on the CPU: blocks are measured, and recomputed in part.

PyTorch's functions for CUDA memory and time are replaced, since the numbers do not matter here.
"""

import importlib

import pytest
import torch

from tests.support import quantised
from tests.support.families import FAMILIES, build, pictures
from tests.support.tiny_base import parts  # noqa: F401
from tests.support.tiny_base import pictures as tiny_pictures  # noqa: F401
from tests.support.without_gpu import replace_cuda_measurements


@pytest.fixture
def without_gpu(monkeypatch):
    replace_cuda_measurements(monkeypatch)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)


@pytest.fixture
def gradients(pack, without_gpu, monkeypatch):
    """Return the gradients of one loss with all blocks kept, recomputed whole, and recomputed in part."""
    training, config = (
        importlib.import_module(f"{pack.__name__}.aclora_core.{name}") for name in ("training", "config")
    )
    progress = importlib.import_module(f"{training.__name__}.progress")
    # So that blocks are met that are not measured, as others of their kind were; most families here have two of each.
    blocks = importlib.import_module(f"{pack.__name__}.aclora_core.acceleration.block_measurement")
    monkeypatch.setattr(blocks, "_MEASURED_OF_A_KIND", 1)
    trainer_of = importlib.import_module(f"{training.__name__}.trainer").Trainer

    def found(model, latents, captions):
        settings = config.TrainConfig(steps=2, batch_size=1, max_rank=4, layers="all", checkpointing="automatic")
        with torch.inference_mode(), pack.nodes.host.training_session(model, latents, captions) as (frozen, images):
            trainer = trainer_of(frozen, images, settings, [0], progress.Progress(2), 2)
            with trainer.ready():
                return list(in_three_ways(trainer))

    return found


def in_three_ways(trainer):
    adapted, checkpointing = trainer.adapted, trainer.adapted.checkpointing
    parameters, image = adapted.parameters, trainer.stream.trial(0)
    with torch.no_grad():
        parameters.master.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    parameters.refresh()
    sizes = checkpointing.measure(lambda: adapted.loss(image)[0])
    assert len(sizes.blocks) == len(sizes.costly) == len(checkpointing.blocks) > 0
    every = set(range(len(checkpointing.blocks)))
    for recomputed, selective in ((set(), set()), (every, set()), (every, every)):
        checkpointing.recomputed, checkpointing.selective = recomputed, selective
        parameters.gradient.zero_()
        adapted.loss(image)[0].backward()
        yield parameters.gradient.clone()


def assert_same(kept, whole, in_part):
    assert kept.any() and kept.isfinite().all()
    assert (whole - kept).norm() <= 1e-5 * kept.norm() and (in_part - kept).norm() <= 1e-5 * kept.norm()


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_are_measured_and_give_the_same_gradients_recomputed(name, gradients):
    family = FAMILIES[name]
    assert_same(*gradients(build(family), *pictures(family)))


@pytest.mark.parametrize("name", quantised.FORMATS)
def test_so_they_do_in_every_format(name, pack, gradients, tiny_pictures):  # noqa: F811
    weights = quantised.tiny_denoiser(pack.nodes.tiny_base.FOLDER)
    assert_same(*gradients(quantised.load(weights, quantised.FORMATS[name]), *tiny_pictures))


def test_so_they_do_with_weights_of_another_packs_class(pack, gradients, tiny_pictures):  # noqa: F811
    weights = quantised.tiny_denoiser(pack.nodes.tiny_base.FOLDER)
    model = quantised.pack_blocks(quantised.load(weights, None, disable_dynamic=True))
    assert_same(*gradients(model, *tiny_pictures))
