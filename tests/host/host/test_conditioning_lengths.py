"""Batches with captions of different lengths: every image is trained with its own caption, as in a batch of one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.families import FAMILIES, build, caption, pictures

JOINED = ("SD1.5", "SD2.1", "SDXL")


def opened(pack, name, lengths):
    """Open the model for training, with one image for each caption length in tokens."""
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(2)
    latents, _ = pictures(family)
    with torch.inference_mode():
        captions = [caption(family, generator, tokens) for tokens in lengths]
    return pack.nodes.host.training_session(build(family), (latents * len(lengths))[: len(lengths)], captions)


def losses(pack, frozen, images, numbers):
    core = pack.aclora_core
    shapes = {number: images.latents[number].shape for number in numbers}
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(n)) for n, shape in shapes.items()]
    joined, sigma = torch.cat(noise), torch.full((len(numbers),), frozen.objective.sigma_at(0.5))
    return core.diffusion.loss.denoising_losses(
        frozen, core.training.batches.make_batch(images, numbers, joined, sigma, 1.0)
    )


@pytest.mark.parametrize("name", JOINED)
def test_rows_with_different_caption_lengths_train_as_single_batches(pack, name):
    with torch.inference_mode(), opened(pack, name, [8, 16, 8, 24]) as (frozen, images):
        assert len(set(images.batch_keys[:3])) == 1
        layers = pack.aclora_core.lora.targets.preset_layers(frozen.network, "attention")
        weights = pack.aclora_core.lora.parameters.make_parameters(
            layers, pack.aclora_core.lora.LoraSpec(2, 2.0), torch.Generator().manual_seed(0), frozen.device
        )
        for branch in weights.layers.values():
            branch.lora_up.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        with pack.aclora_core.lora.injection.injected(layers, weights.layers):

            def gradient(numbers):
                weights.gradient.zero_()
                losses(pack, frozen, images, numbers).mean().backward()
                return weights.gradient.clone()

            together, single = gradient([0, 1, 2]), sum(gradient([number]) for number in range(3)) / 3
        torch.testing.assert_close(together, single, rtol=1e-4, atol=1e-6)
        assert together.abs().max() > 1e-4


def test_a_repeated_caption_gives_the_same_loss(pack):
    with torch.inference_mode(), opened(pack, "SDXL", [8, 16]) as (frozen, images), torch.no_grad():
        longer = losses(pack, frozen, images, [0])
        before = images.conditions[0]["c_crossattn"]
        images.conditions[0] = {**images.conditions[0], "c_crossattn": before._copy_with(before.cond[:, :8])}
        torch.testing.assert_close(losses(pack, frozen, images, [0]), longer, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["SD3", "Flux.1", "Lumina 2", "Qwen-Image"])
def test_networks_that_would_mix_captions_get_separate_batches(pack, name):
    with torch.inference_mode(), opened(pack, name, [8, 16]) as (frozen, images):
        assert images.batch_keys[0] != images.batch_keys[1]


@given(st.sets(st.integers(1, 12).map(lambda chunks: 77 * chunks), min_size=1))
def test_every_caption_is_repeated_at_most_four_times(pack, lengths):
    targets = pack.nodes.host.conditioning_lengths._targets(lengths)
    assert targets.keys() == lengths
    for length, target in targets.items():
        assert target % length == 0 and target <= 4 * length
    assert len(set(targets.values())) <= len(lengths)
    if math.lcm(*lengths) <= 4 * min(lengths):
        assert set(targets.values()) == {math.lcm(*lengths)}
