"""The empty caption in ComfyUI's models: rows that fit into a batch, and the frozen model's own prediction."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from tests.host.host.test_text_encoder_families import SHAPES, text_encoder
from tests.support.families import FAMILIES, build, caption, pictures
from tests.support.gradients import gradient
from tests.support.tiny_base import caption as encoded

LENGTHS = (8, 16, 40)
EMPTY = 8  # tokens of the empty caption


def opened(pack: ModuleType, name: str) -> Any:
    """Open the model for training, with one image for each caption length, and with the empty caption."""
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(2)
    latents, _ = pictures(family)
    with torch.inference_mode():
        captions = [caption(family, generator, tokens) for tokens in (*LENGTHS, EMPTY)]
    return pack.nodes.host.training_session(
        build(family), [*latents, latents[0]], captions[:-1], unconditional=captions[-1]
    )


def trainer_of(pack: ModuleType, model: Any, images: Any, **settings: Any) -> Any:
    """Return the parts of a training with an adapter that adds something."""
    core = pack.aclora_core
    config = core.config.train_config.TrainConfig(
        **{"batch_size": 3, "max_rank": 2, "alpha": 2.0, "mode": "off", "layers": "all", **settings}
    )
    trainer = core.training.trainer.Trainer(model, images, config, range(3), core.training.progress.Progress(1), 1)
    with torch.no_grad():
        trainer.adapted.parameters.master.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    trainer.adapted.parameters.refresh()
    return trainer


@pytest.mark.parametrize("name", ["SD1.5", "SDXL"])
def test_the_empty_caption_shares_batches_where_captions_are_repeated_to_a_common_length(pack, name) -> None:
    with torch.inference_mode(), opened(pack, name) as (_, images):
        assert images.without_caption == {0: 3, 1: 4, 2: 5} and len(images.latents) == 6
        assert images.batch_keys[3] == images.batch_keys[0] == images.batch_keys[1]
        together = images.conditioning([0, 4])
        short, empty = images.conditioning([0]), images.conditioning([4])
        for part, tensor in together.items():
            assert torch.equal(tensor, torch.cat([short[part], empty[part]])), part


@pytest.mark.parametrize("name", ["SD1.5", "SD3", "Flux.1", "Lumina 2"])
def test_dropped_captions_train_as_single_batches_do(pack, name) -> None:
    """Whether they share micro-batches with captions or, being of another length, get their own."""
    core = pack.aclora_core
    with torch.inference_mode(), opened(pack, name) as (model, images):
        trainer = trainer_of(pack, model, images, caption_dropout=0.5)
        with trainer.ready():
            steps = [trainer.stream.next_step().batches for _ in range(8)]
            batches = next(step for step in steps if 0 < sum(i >= 3 for batch in step for i in batch.indices) < 3)
            together = gradient(trainer, batches)
            rows = [row for batch in batches for row in core.training.batches.split_rows(images, batch, 1)]
            assert len(rows) == 3
            single = gradient(trainer, rows)
    assert together.abs().max() > 1e-5
    torch.testing.assert_close(together, single, rtol=1e-3, atol=1e-5 * float(single.abs().max()))


# Fused attention and convolutions; layers that compute with quantised weights; captions of any length; video.
@pytest.mark.parametrize("name", ["SDXL", "SDXL in fp16", "SD3 in fp8", "Stable Cascade C", "Lumina 2", "Wan 2.1"])
def test_the_prior_is_the_prediction_of_the_model_without_the_adapter(pack, name) -> None:
    with torch.inference_mode(), opened(pack, name) as (model, images):
        trainer = trainer_of(pack, model, images, prior_weight=1.0)
        prior = next(batch for batch in trainer.stream.next_step().batches if batch.prior)
        noisy = model.objective.add_noise(prior.sigma, prior.noise, prior.latents)
        with torch.no_grad():
            alone = model.denoise(noisy, prior.sigma, prior.conditioning).float()
        with trainer.ready():
            base = trainer.adapted._base_prediction(noisy, prior)
            with torch.no_grad():
                adapted = model.denoise(noisy, prior.sigma, prior.conditioning).float()
            loss, reported = trainer.adapted.loss(prior)
            loss.backward()
    tolerance = 2e-2 if "in f" in name else 1e-4
    torch.testing.assert_close(base, alone, rtol=tolerance, atol=tolerance * float(alone.abs().max()))
    assert (adapted - alone).abs().max() > 10 * (base - alone).abs().max()
    assert loss > 0 and reported == 0 and trainer.adapted.parameters.gradient.any()


def test_a_text_encoder_that_learns_encodes_the_empty_caption_itself(pack) -> None:
    family, (latents, _) = FAMILIES["SDXL"], pictures(FAMILIES["SDXL"])
    clip = text_encoder(family, SHAPES["SDXL"])
    words = ("a red diamond", "a blue ball")
    captions = [pack.nodes.host.with_caption(encoded((None, clip), text), text) for text in words]
    empty = encoded((None, clip), "")
    session = pack.nodes.host.training_session(build(family), latents, captions, clip, empty)
    with torch.inference_mode(), session as (frozen, images):
        assert [each.written for each in frozen.text.captions] == [*words, "", ""]
        found = images.conditioning([2])["c_crossattn"]
        fixed = images.conditions[2]["c_crossattn"].cond
        torch.testing.assert_close(found, fixed, rtol=1e-4, atol=1e-4)
        config = pack.aclora_core.config.train_config.TrainConfig(
            steps=4, max_rank=2, mode="off", text_learning=1.0, caption_dropout=0.5, prior_weight=0.5
        )
        result = pack.aclora_core.training.train(frozen, images, config)
    ups = {name: layer.lora_up for name, layer in result.adapter.layers.items()}
    assert any(up.any() for name, up in ups.items() if name.startswith("text_encoders."))
    assert all(torch.isfinite(up).all() for up in ups.values())


def test_an_unconditional_made_of_several_is_refused(pack) -> None:
    family = FAMILIES["SD1.5"]
    latents, captions = pictures(family)
    session = pack.nodes.host.training_session(build(family), latents, captions, unconditional=captions[0] * 2)
    with pytest.raises(ValueError, match="unconditional is made of 2 conditionings"), session:
        pass
