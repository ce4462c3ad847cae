"""What steps learn from: the same numbers however a step is split, and weights of noise levels beside the pictures'."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from aclora_core.config.train_config import TrainConfig
from aclora_core.diffusion.objective import loss_weights
from aclora_core.storage.nested import tensors_in
from aclora_core.training.batches import BatchStream, StepBatches
from tests.support.toy import FLOW, toy

CONFIG = TrainConfig(batch_size=2, accumulate=3)
EPS = replace(
    FLOW,
    sampling="uniform",
    prediction="ε",
    add_noise=lambda sigma, noise, latent: latent + sigma.view(-1, 1, 1, 1) * noise,
)


def drawn(model, steps: int = 5, **changes) -> list[StepBatches]:
    config = replace(CONFIG, **changes)
    drawing = BatchStream(model, model, config, range(len(model.latents)), torch.Generator().manual_seed(config.seed))
    return [drawing.next_step() for _ in range(steps)]


def joined(step: StepBatches, name: str) -> Tensor:
    return torch.cat([getattr(batch, name) for batch in step.batches])


@pytest.mark.parametrize("count", [12, 16])
def test_a_step_has_the_numbers_of_one_batch_however_it_is_split(count: int) -> None:
    model = toy(count, objective=FLOW)
    ways = [drawn(model, batch_size=size, accumulate=6 // size) for size in (1, 2, 3, 6)]
    for steps in zip(*ways, strict=True):
        *split, whole = steps
        assert len(whole.batches) == 1
        for step in split:
            assert replace(step, batches=[]) == replace(whole, batches=[])
            for name in ("latents", "noise", "sigma", "weight"):
                assert torch.equal(joined(step, name), joined(whole, name)), name
    sizes = [[len(batch.latents) for batch in step.batches] for step in ways[1]]
    assert sizes[0] == [2, 2, 2] or count == 16


def test_the_pictures_of_a_step_weigh_one_together_whatever_their_batches() -> None:
    groups = ["wide"] * 4 + ["tall"] * 3 + ["long"]
    for step in drawn(toy(8, objective=FLOW, batch_keys=groups), 9):
        weights = joined(step, "weight")
        assert weights.sum() == pytest.approx(1) and len(set(weights.tolist())) == 1


def test_noise_levels_get_their_weights_beside_the_pictures() -> None:
    plain, weighted = (drawn(toy(8, objective=EPS), loss_weight=kind) for kind in ("none", "debiased"))
    for one, other in zip(plain, weighted, strict=True):
        for before, batch in zip(one.batches, other.batches, strict=True):
            assert before.noise_level_weight is None and torch.equal(before.weight, batch.weight)
            assert torch.equal(batch.noise_level_weight, loss_weights(EPS, batch.sigma, "debiased", 5.0))
            torch.testing.assert_close(batch.noise_level_weight, batch.sigma)  # 1 / √SNR


def test_larger_pictures_get_more_noise_where_that_is_wished() -> None:
    shifting = replace(FLOW, shift_of=lambda latent: 50.0)
    model = toy(12, objective=shifting)
    usual, shifted = (
        torch.cat([joined(step, "sigma") for step in drawn(model, timesteps=how)]) for how in ("automatic", "shifted")
    )
    torch.testing.assert_close(shifted / (1 - shifted), (50 * usual / (1 - usual)).clamp_max(999), rtol=1e-3, atol=0)


def test_the_shift_gives_every_image_more_noise() -> None:
    usual, shifted = (
        torch.cat([joined(step, "sigma") for step in drawn(toy(12, objective=FLOW), timestep_shift=shift)])
        for shift in (1.0, 3.0)
    )
    torch.testing.assert_close(shifted / (1 - shifted), (3 * usual / (1 - usual)).clamp_max(999), rtol=1e-3, atol=0)


@pytest.mark.parametrize("groups", [(), ["wide"] * 7 + ["tall"] * 3 + ["long"] * 2], ids=["one size", "three sizes"])
def test_stratified_noise_levels_come_from_equal_parts_over_the_whole_step(groups) -> None:
    model = toy(12, objective=replace(FLOW, sampling="uniform"), batch_keys=groups)
    steps = drawn(model, 20, stratified_timesteps=True)
    assert groups == () or any(len({batch.key[0] for batch in step.batches}) > 1 for step in steps)
    for step in steps:
        levels = joined(step, "sigma")
        assert (6 * levels).floor().sort().values.tolist() == list(range(6))
    varied = {len(set(values)) for values in zip(*(joined(step, "sigma").tolist() for step in steps), strict=True)}
    assert varied == {20}


def test_stratified_noise_levels_make_the_loss_of_a_step_vary_less() -> None:
    model = toy(12, objective=FLOW)
    means = [
        torch.stack([joined(step, "sigma").mean() for step in drawn(model, 200, stratified_timesteps=on)])
        for on in (False, True)
    ]
    assert means[1].var() < means[0].var() / 5
    assert means[1].mean() == pytest.approx(float(means[0].mean()), abs=0.02)


def test_a_trial_takes_nothing_from_the_training() -> None:
    model = toy(8, objective=FLOW)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    trial = BatchStream(model, model, CONFIG, range(8), generator).trial(3)
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(trial.latents, model.latents[3]) and trial.weight.tolist() == [1.0]


def test_a_stream_resumes_in_the_middle_of_an_epoch() -> None:
    model = toy(16, objective=FLOW)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    whole, other = (BatchStream(model, model, CONFIG, range(16), generator) for generator in generators)
    for _ in range(4):
        whole.next_step()
    other.load_state_dict(whole.state_dict())
    for _ in range(5):
        one, two = whole.next_step(), other.next_step()
        assert (one.epoch, one.ends_epoch) == (two.epoch, two.ends_epoch)
        assert torch.equal(joined(one, "noise"), joined(two, "noise"))


def test_batches_of_one_key_hold_tensors_of_the_same_shapes_also_where_some_pictures_have_masks() -> None:
    """A recorded graph has the inputs of the first; those of all others are copied into them."""
    masks = {number: torch.ones(1, 1, 1, 1) for number in (0, 5)}
    model = toy(12, objective=FLOW, masks=masks, regularisation={9: 0.5}, batch_keys=["wide"] * 8 + ["tall"] * 4)
    known: dict = {}
    for step in drawn(model, 30):
        for batch in step.batches:
            shapes = [(tensor.shape, tensor.dtype) for tensor in tensors_in(batch)]
            assert known.setdefault(batch.key, shapes) == shapes and len(shapes) == 7
    assert len(known) >= 2


def test_batches_that_cannot_be_pinned_are_used_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tensor: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(Tensor, "pin_memory", refuse)
    model = toy(4)
    drawing = BatchStream(model, model, CONFIG, range(4), torch.Generator().manual_seed(0))
    model.device = torch.device("cuda")
    batches = drawing.prefetch()
    assert sum(len(batch.sigma) for batch in batches) == 4 and drawing.next_step().batches == list(batches)
