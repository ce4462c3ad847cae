"""The empty caption in a training: caption dropout, and prior preservation by the base's own prediction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from aclora_core.config import CheckpointConfig, TrainConfig
from aclora_core.diffusion import Batch, SimpleModel, SimpleTrainingSet
from aclora_core.training import train
from aclora_core.training.adapted_model import AdaptedModel
from aclora_core.training.batches import BatchStream, split_rows
from tests.support.toy import FLOW

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = TrainConfig(
    steps=12, learning_rate=0.02, batch_size=4, max_rank=4, mode="off", held_out=0.0, layers="all", weight_decay=0.0
)
EMPTY = torch.full((1, 3), -9.0)


def captioned_model() -> SimpleModel:
    """A network whose prediction depends on its caption, of three numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = nn.Sequential(nn.Linear(8 + 1 + 3, 16), nn.SiLU(), nn.Linear(16, 8)).requires_grad_(False)

    def predict(noisy: Tensor, sigma: Tensor, captions: Tensor) -> Tensor:
        captions = captions.flatten(1)[:, :3]
        return network(torch.cat([noisy.flatten(1), sigma[:, None], captions], dim=1)).view(noisy.shape)

    return SimpleModel(network, FLOW, predict)


def images(count: int = 8, **more) -> SimpleTrainingSet:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(count, 1, 2, 2, 2, generator=generator).unbind()
    return SimpleTrainingSet(latents, torch.randn(count, 1, 3, generator=generator).unbind(), **more)


def stream(pictures: SimpleTrainingSet, **changes) -> BatchStream:
    config = replace(QUICK, **changes)
    count = len(pictures.latents) - len(pictures.without_caption)
    return BatchStream(captioned_model(), pictures, config, range(count), torch.Generator().manual_seed(0))


def batches(drawn: BatchStream, steps: int) -> list[Batch]:
    return [batch for _ in range(steps) for batch in drawn.next_step().batches]


def adapted(**changes) -> AdaptedModel:
    """An adapter that is trained already, as far as its weights are concerned."""
    model = AdaptedModel(captioned_model(), replace(QUICK, **changes), torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.parameters.master.copy_(torch.randn(model.parameters.master.shape, generator=torch.manual_seed(5)))
    return model


def factors(result) -> list[Tensor]:
    return [factor for layer in result.adapter.layers.values() for factor in (layer.lora_down, layer.lora_up)]


def test_an_unconditional_that_no_setting_asks_for_changes_nothing() -> None:
    config = replace(QUICK, steps=30, mode="paper", held_out=0.25, restart_every=3)
    plain, given = (train(captioned_model(), each, config) for each in (images(), images().with_unconditional(EMPTY)))
    assert plain.report.losses == given.report.losses and plain.report.validation == given.report.validation
    assert all(torch.equal(one, other) for one, other in zip(factors(plain), factors(given), strict=True))


def test_captions_are_dropped_as_often_as_the_setting_says_and_nothing_else_changes() -> None:
    drawn = batches(stream(images().with_unconditional(EMPTY), caption_dropout=0.25), 500)
    captions = torch.cat([batch.conditioning for batch in drawn])
    dropped = (captions == EMPTY).all(1)
    assert dropped.float().mean() == pytest.approx(0.25, abs=0.03)
    known = images()
    for batch in drawn:
        for latent, caption, index in zip(batch.latents, batch.conditioning, batch.indices, strict=True):
            assert torch.equal(latent[None], known.latents[index % 8])
            assert torch.equal(caption[None], EMPTY if index >= 8 else known.conditionings[index])
    seen = [sorted(index % 8 for batch in drawn[n : n + 2] for index in batch.indices) for n in range(0, 500, 2)]
    assert all(epoch == list(range(8)) for epoch in seen)


def test_captions_that_are_always_dropped_are_never_learned() -> None:
    pictures = images().with_unconditional(EMPTY)
    other = replace(images(), conditionings=[torch.zeros(1, 3)] * 8).with_unconditional(EMPTY)
    config = replace(QUICK, caption_dropout=1.0)
    one, two = (train(captioned_model(), each, config).report.losses for each in (pictures, other))
    assert one == two and one != train(captioned_model(), pictures, QUICK).report.losses


def test_a_picture_keeps_its_mask_and_its_weight_where_its_caption_is_dropped() -> None:
    mask = torch.zeros(1, 1, 2, 2)
    mask[..., 0] = 1.0
    pictures = images(masks={2: mask}, regularisation={5: 0.5}).with_unconditional(EMPTY)
    plain = stream(pictures)
    dropping = stream(pictures, caption_dropout=1.0)
    for one, other in zip(batches(plain, 2), batches(dropping, 2), strict=True):
        weights = [dict(zip([i % 8 for i in b.indices], b.train_weight.tolist(), strict=True)) for b in (one, other)]
        assert all(weight[index] == (0.125 if index == 5 else 0.25) for weight in weights for index in weight)
        for batch in (one, other):
            for index, positions in zip(batch.indices, batch.position_weights, strict=True):
                assert positions.flatten().tolist() == ([2, 0, 2, 0] if index % 8 == 2 else [1, 1, 1, 1])


def test_an_empty_caption_of_another_shape_gets_micro_batches_of_its_own() -> None:
    """As with text encoders whose captions are as long as their words."""

    class Long(SimpleTrainingSet):
        @property
        def batch_keys(self) -> list[tuple[int, ...]]:  # type: ignore[override]
            return [(*x.shape, *c.shape) for x, c in zip(self.latents, self.conditionings, strict=True)]

    known = images()
    pictures = Long(known.latents, known.conditionings).with_unconditional(torch.ones(1, 5))
    drawn = batches(stream(pictures, caption_dropout=0.5), 20)
    assert {batch.conditioning.shape[1] for batch in drawn} == {3, 5}
    assert sum(len(batch.indices) for batch in drawn) == 20 * 4
    assert torch.isfinite(
        torch.tensor(train(captioned_model(), pictures, replace(QUICK, caption_dropout=0.5)).report.losses)
    ).all()


@pytest.mark.parametrize("setting", ["caption_dropout", "prior_weight"])
def test_without_an_empty_caption_the_training_does_not_begin(setting: str) -> None:
    with pytest.raises(ValueError, match=r"empty caption.*Connect"):
        train(captioned_model(), images(), replace(QUICK, **{setting: 0.5}), lambda progress: pytest.fail("it began"))


def test_the_frozen_model_predicts_as_without_the_adapter_and_the_adapter_comes_back() -> None:
    model = adapted(prior_weight=1.0)
    (_, prior) = batches(stream(images().with_unconditional(EMPTY), prior_weight=1.0), 1)
    noisy = FLOW.add_noise(prior.sigma, prior.noise, prior.latents)
    alone = captioned_model().denoise(noisy, prior.sigma, prior.conditioning)
    before = model.parameters.compute.clone()
    with model.injected():
        assert not torch.allclose(model.model.denoise(noisy, prior.sigma, prior.conditioning), alone, atol=0.1)
        torch.testing.assert_close(model._base_prediction(noisy, prior), alone, rtol=0, atol=1e-6)
        with pytest.raises(RuntimeError, match="memory"), model.parameters.switched_off():
            raise RuntimeError("out of memory")
    assert torch.equal(model.parameters.compute, before)


@pytest.mark.parametrize("loss_weight", ["none", "debiased"])
def test_the_prior_is_the_mean_squared_distance_of_the_raw_outputs_and_is_not_reported(loss_weight) -> None:
    changes = {"prior_weight": 0.7, "loss_weight": loss_weight}
    model = adapted(**changes)
    pictures = images().with_unconditional(EMPTY)
    plain, prior = batches(stream(pictures, **changes), 1)
    assert torch.equal(prior.noise, plain.noise) and torch.equal(prior.sigma, plain.sigma) and plain.key != prior.key
    assert torch.equal(prior.latents, plain.latents) and torch.equal(prior.conditioning, EMPTY.expand(4, 3))
    noisy = FLOW.add_noise(prior.sigma, prior.noise, prior.latents)
    base = captioned_model().predict(noisy, prior.sigma, prior.conditioning)
    with model.injected():
        loss, reported = model.loss(prior)
        now = model.model.predict(noisy, prior.sigma, prior.conditioning)
    each = (now - base).square().flatten(1).mean(1)
    levels = 1.0 if prior.noise_level_weight is None else prior.noise_level_weight
    torch.testing.assert_close(loss, 0.7 * (each * levels).mean(), rtol=1e-3, atol=1e-6)
    assert reported == 0 and loss > 0


def test_parts_of_a_prior_batch_add_up_to_it() -> None:
    model = adapted(prior_weight=1.0)
    pictures = images().with_unconditional(EMPTY)
    _, prior = batches(stream(pictures, prior_weight=1.0), 1)
    parts = split_rows(pictures, prior, 1)
    assert len(parts) == 4 and all(part.prior and part.key != prior.key for part in parts)
    with model.injected():
        whole, each = model.loss(prior)[0], [model.loss(part)[0] for part in parts]
    torch.testing.assert_close(sum(each), whole)


def test_the_first_step_knows_no_distance_to_the_base() -> None:
    """The adapter adds nothing yet, so its prediction is the base's own."""
    model = AdaptedModel(captioned_model(), QUICK, torch.Generator().manual_seed(0))
    _, prior = batches(stream(images().with_unconditional(EMPTY), prior_weight=1.0), 1)
    with model.injected():
        loss, _ = model.loss(prior)
        loss.backward()
    assert loss == 0 and not model.parameters.gradient.any()


def test_a_prior_keeps_the_prediction_without_a_caption_near_the_base() -> None:
    pictures = images(16).with_unconditional(EMPTY)

    def distance(weight: float) -> tuple[float, float]:
        config = replace(QUICK, steps=80, learning_rate=5e-3, prior_weight=weight)
        result = train(captioned_model(), pictures, config)
        model = AdaptedModel(captioned_model(), config, torch.Generator())
        model.parameters.load(result.adapter.layers)
        noisy, sigma = torch.randn(64, 2, 2, 2, generator=torch.manual_seed(7)), torch.linspace(0.1, 0.9, 64)
        base = captioned_model().predict(noisy, sigma, EMPTY.expand(64, 3))
        with model.injected(), torch.no_grad():
            now = model.model.predict(noisy, sigma, EMPTY.expand(64, 3))
        return float((now - base).square().mean()), sum(result.report.losses[-10:])

    (free, learned), (held, learned_too) = distance(0.0), distance(5.0)
    assert held < free / 5
    assert learned_too < 1.5 * learned  # the captions still learn


@pytest.mark.parametrize("changes", [{"caption_dropout": 0.3}, {"prior_weight": 0.5}])
def test_a_training_with_empty_captions_resumes_bit_for_bit(changes, tmp_path: Path) -> None:
    pictures = images().with_unconditional(EMPTY)
    config = replace(QUICK, steps=20, mode="paper", restart_steps=6, **changes)
    whole = train(captioned_model(), pictures, config)
    steps: list[int] = []
    checkpoints = CheckpointConfig(tmp_path, every=5)
    train(
        captioned_model(),
        pictures,
        config,
        lambda p: steps.append(p.step),
        lambda: len(steps) == 7,
        checkpoints=checkpoints,
    )
    resumed = train(captioned_model(), pictures, config, checkpoints=checkpoints)
    assert resumed.report.losses == whole.report.losses
    assert all(torch.equal(one, other) for one, other in zip(factors(whole), factors(resumed), strict=True))
    other = images().with_unconditional(EMPTY + 1)
    with pytest.raises(ValueError, match="or their captions have changed"):
        train(captioned_model(), other, config, checkpoints=checkpoints)


def test_a_prior_with_captions_of_a_network_in_bfloat16_stays_finite() -> None:
    pictures = images().with_unconditional(EMPTY)
    model = captioned_model()
    model.network.to(torch.bfloat16)
    half = replace(
        model, dtype=torch.bfloat16, predict=lambda x, s, c: model.predict(x.bfloat16(), s.bfloat16(), c.bfloat16())
    )
    result = train(half, pictures, replace(QUICK, prior_weight=1.0, caption_dropout=0.2))
    assert all(torch.isfinite(factor).all() for factor in factors(result))
    assert any(factor.any() for factor in factors(result)[1::2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_captured_prior_trains_as_the_eager_one_does(caplog) -> None:
    def trained(graph: bool) -> tuple[list[float], list[Tensor]]:
        model = captioned_model()
        on_cuda = replace(model, network=model.network.cuda(), device=torch.device("cuda"))
        config = replace(QUICK, mode="paper", restart_steps=5, prior_weight=1.0, caption_dropout=0.3, graph=graph)
        result = train(on_cuda, images().with_unconditional(EMPTY), config)
        return result.report.losses, factors(result)

    with caplog.at_level("INFO"):
        (eager_losses, eager), (losses, captured) = trained(False), trained(True)
    assert "cannot be captured" not in caplog.text
    assert losses == pytest.approx(eager_losses, rel=1e-3)
    for one, other in zip(eager, captured, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-2, atol=1e-3)
