"""Held-out pictures: chosen fairly, measured at fixed noise, and the best step kept."""

import logging
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from aclora_core.config.checkpoints import CheckpointConfig
from aclora_core.config.train_config import TrainConfig
from aclora_core.lora.injection import injected
from aclora_core.lora.parameters import LoraSpec, make_parameters
from aclora_core.lora.targets import preset_layers
from aclora_core.training.early_stopping import EarlyStopping
from aclora_core.training.fixed_noise import FixedNoiseImages, mean_denoising_loss
from aclora_core.training.held_out import different_images, hold_out
from aclora_core.training.progress import Progress, Result
from aclora_core.training.summary import training_summary
from aclora_core.training.trainer import Trainer
from tests.support.toy import FLOW, HELD_OUT, Toy, toy, train

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = replace(
    HELD_OUT,
    steps=60,
    learning_rate=0.02,
    batch_size=8,
    max_rank=8,
    mode="off",
    weight_decay=0.0,
    refit=False,
    smallest=False,
)


@pytest.mark.parametrize(
    ("count", "share", "held"), [(8, 0.2, 2), (16, 0.2, 3), (30, 0.2, 6), (8, 0.01, 1), (200, 0.2, 12)]
)
def test_a_share_is_held_out(count: int, share: float, held: int) -> None:
    learned, aside = hold_out(toy(count), range(count), share, seed=3)
    assert len(aside) == held and sorted(learned + aside) == list(range(count))


@pytest.mark.parametrize(("count", "share"), [(7, 0.2), (48, 0.0)])
def test_few_pictures_or_no_share_hold_out_none(count: int, share: float) -> None:
    assert hold_out(toy(count), range(count), share, seed=3) == (list(range(count)), [])


def test_the_choice_follows_the_seed() -> None:
    choices = {tuple(hold_out(toy(20), range(20), 0.2, seed)[1]) for seed in range(8)}
    assert len(choices) > 4 and hold_out(toy(20), range(20), 0.2, 1) == hold_out(toy(20), range(20), 0.2, 1)


def test_copies_of_a_picture_stay_on_one_side() -> None:
    model = toy(10)
    model.latents = [picture for picture in model.latents for _ in range(3)]
    model.batch_keys = ["alike"] * 30
    learned, aside = hold_out(model, range(30), 0.3, seed=0)
    assert len(aside) == 3 and len(learned) == 21  # the other copies of a held-out picture teach nothing
    assert {number // 3 for number in learned}.isdisjoint(number // 3 for number in aside)
    assert hold_out(model, range(21), 0.3, seed=0)[1] == []  # seven different pictures are too few


def test_different_pictures_come_in_order_with_their_copies() -> None:
    model = toy(5)
    model.latents = [*model.latents, model.latents[1], model.latents[3].clone()]
    assert different_images(model, range(7)) == [[0], [1, 5], [2], [3, 6], [4]]
    assert different_images(model, [6, 2, 3]) == [[6, 3], [2]]


def test_only_the_named_pictures_are_split() -> None:
    learned, aside = hold_out(toy(40), range(0, 40, 2), 0.25, seed=0)
    assert len(aside) == 5 and sorted(learned + aside) == list(range(0, 40, 2))


def test_a_measurement_is_the_same_again_and_in_other_batches() -> None:
    model = toy(12, objective=FLOW, batch_keys=["wide", "tall"] * 6)
    found = [FixedNoiseImages(model, model, [1, 4, 7, 9], 5, size).losses() for size in (1, 2, 16)]
    assert found[0].shape == (16,) and found[0].dtype == torch.float64
    for other in found[1:]:
        assert sorted(found[0].tolist()) == pytest.approx(sorted(other.tolist()), rel=1e-5)
    assert torch.equal(found[0], FixedNoiseImages(model, model, [1, 4, 7, 9], 5, 1).losses())
    assert not torch.equal(found[0], FixedNoiseImages(model, model, [1, 4, 7, 9], 6, 1).losses())
    assert mean_denoising_loss(model, model, [1, 4, 7, 9], 5) == pytest.approx(float(found[0].mean()), rel=1e-5)


def test_conditionings_are_made_once_for_all_levels_and_not_before_the_first_measurement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, asked = toy(12, objective=FLOW, batch_keys=["wide", "tall"] * 6), list[list[int]]()
    conditioning = model.conditioning
    monkeypatch.setattr(model, "conditioning", lambda indices: (asked.append(list(indices)), conditioning(indices))[1])
    images = FixedNoiseImages(model, model, [1, 4, 7, 9], 5, 2)
    assert not asked
    images.losses()
    images.losses()
    assert asked == [[1, 7], [9], [4]]


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_each_of_several_processes_may_send_fewer_images_through_the_model(rows: int) -> None:
    model, calls = toy(), list[int]()
    denoise = model.denoise

    def counted(noisy: Tensor, *others: Any) -> Tensor:
        calls.append(len(noisy))
        return denoise(noisy, *others)

    model.denoise = counted  # type: ignore[method-assign]

    def own(rank: int, limit: int) -> list[Tensor]:
        processes: Any = SimpleNamespace(rank=rank, size=2)
        images = FixedNoiseImages(model, model, [1, 4, 7, 9, 11, 12, 13], 5, 4, processes=processes)
        images.limit(16)
        before = list(images.iterate_losses())
        calls.clear()
        images.limit(limit)
        found = list(images.iterate_losses())
        assert max(calls) == min(limit, len(before[0]))
        torch.testing.assert_close(found, before)
        return found

    limited, whole = own(0, rows), own(1, 16)
    assert [len(it) for it in limited] == [4] * 4 and [len(it) for it in whole] == [3] * 4


def test_a_measurement_neither_learns_nor_draws_random_numbers() -> None:
    model = toy(12, objective=FLOW)
    layers = preset_layers(model.network, "all", model.prefix)
    weights = make_parameters(layers, LoraSpec(4, 4.0), torch.Generator().manual_seed(0), model.device)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    with injected(layers, weights.layers, model.is_unpatched):
        FixedNoiseImages(model, model, range(12), 0).losses()
    assert torch.equal(torch.rand(1), expected) and not weights.gradient.any()


def watched(losses: list[float], batch_size: int = 4) -> EarlyStopping:
    """A validation of three pictures that measures these losses, a measurement every 30 steps."""
    model = toy(3)
    weights = make_parameters(
        preset_layers(model.network, "all"), LoraSpec(1, 1.0), torch.Generator().manual_seed(0), model.device
    )
    held_out = FixedNoiseImages(model, model, range(3), 0)
    held_out.iterate_losses = lambda: iter([torch.tensor([losses.pop(0)])])  # type: ignore[method-assign]
    return EarlyStopping(held_out, weights, batch_size, 1.0)


def test_measurements_come_so_rarely_that_they_cost_little() -> None:
    """Twelve rows forwards take as long as 1.2 steps of four rows, of which thirty lie between two measurements."""
    assert watched([]).interval == 30 and watched([], batch_size=1).interval == 120
    assert [step for step in range(1, 76) if watched([]).is_due(step, 75)] == [30, 60, 75]


@pytest.mark.parametrize(("images", "batch_size", "expected"), [(3, 64, 3), (8, 4, 4), (1, 4, 1)])
def test_a_step_takes_no_more_images_than_there_are(images: int, batch_size: int, expected: int) -> None:
    """Measurements would come too often otherwise, as a step would seem to cost more than it does."""
    model, config = toy(images), TrainConfig(batch_size=batch_size, max_rank=2)
    assert Trainer(model, model, config, range(images), Progress(2), 2).images_per_step == expected


def test_losses_are_read_before_they_become_float64_which_mps_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    model = toy(2)
    images = FixedNoiseImages(model, model, range(2), 0)
    on_device = SimpleNamespace(double=refuse, cpu=lambda: torch.ones(2))
    monkeypatch.setattr(images._graphs, "call", lambda *_: on_device)
    assert images.losses().dtype == torch.float64


def test_the_best_step_is_kept_and_found_again() -> None:
    validation = watched([0.5, 0.9, 0.7, 0.8, 0.75])
    kept = None
    for step in (0, 30, 60, 90, 120):
        validation.parameters.master.fill_(step)
        validation.measure(step)
        kept = validation.parameters.master.clone() if step == 60 else kept
    assert (validation.best_step, validation.best_loss) == (60, pytest.approx(0.7))  # step 0 is no adapter
    assert validation.restore_best(120) == 60
    assert torch.equal(validation.parameters.master, kept)


@pytest.mark.parametrize("losses", [[0.9, 0.8, 0.7], [math.nan, math.nan, math.nan]])
def test_the_last_step_stays_when_none_was_better(losses: list[float]) -> None:
    validation = watched(list(losses))
    for step in (0, 30, 60):
        validation.measure(step)
    validation.parameters.master.fill_(7)
    assert validation.restore_best(75) == 75
    assert (validation.parameters.master == 7).all()


def test_a_measurement_that_is_stopped_counts_for_nothing() -> None:
    validation = watched([0.5, 0.4])
    validation.measure(30)
    validation.measure(60, lambda: True)
    assert validation.history == [(30, pytest.approx(0.5))] and validation.best_step == 30


def test_training_has_passed_the_best_after_three_measurements_or_half_its_steps() -> None:
    validation = watched([1.0, 0.5, *[0.6] * 20])
    passed = []
    for step in range(0, 300, 30):
        validation.measure(step)
        passed.append(validation.ends_training())
    assert passed.index(True) == 4  # step 30 was best; 60, 90 and 120 were not
    late = watched([1.0] + [1 - step / 1000 for step in range(30, 330, 30)] + [0.9] * 20)
    steps = iter(range(0, 900, 30))
    while not late.ends_training():
        late.measure(step := next(steps))
    assert late.best_step == 300 and step == 450


def spoilt(count: int = 16) -> Toy:
    """Few pictures of a noisy model: what is learned soon no longer serves the held-out ones."""
    return toy(count, objective=FLOW)


def test_a_training_measures_stops_and_gives_the_best_step() -> None:
    report = train(spoilt(), replace(CONFIG, steps=2000)).report
    steps = [step for step, _ in report.validation]
    assert steps[0] == 0 and steps[1:] == list(range(15, 15 * len(steps), 15))
    best = min(report.validation[1:], key=lambda pair: pair[1])
    assert report.facts.best_step == best[0] < steps[-1] < 2000
    assert report.facts.steps_run == len(report.losses) == steps[-1]
    assert report.facts.held_out_images == 3 and report.facts.validation_seconds > 0


def test_the_given_adapter_is_that_of_the_best_step() -> None:
    model, config = spoilt(), replace(CONFIG, steps=400)
    result = train(model, config)
    best_loss = min(loss for step, loss in result.report.validation if step)
    _, aside = hold_out(model, range(16), 0.2, config.seed)
    layers = preset_layers(model.network, "all", model.prefix)
    weights = make_parameters(layers, LoraSpec(8, 8.0), torch.Generator().manual_seed(0), model.device)
    weights.load(result.adapter.layers)
    with injected(layers, weights.layers, model.is_unpatched):
        again = mean_denoising_loss(model, model, aside, config.seed)
    base = mean_denoising_loss(model, model, aside, config.seed)
    assert again / base == pytest.approx(best_loss / result.report.validation[0][1], rel=1e-4) and again < base


def test_held_out_pictures_are_never_learned_from() -> None:
    model = spoilt()
    _, aside = hold_out(model, range(16), 0.2, 0)
    train(model, replace(CONFIG, steps=12, batch_size=13))
    with_gradient = [call for call in model.calls if len(call) == 13]
    assert len(with_gradient) == 12 and all(set(call).isdisjoint(aside) for call in with_gradient)


def test_a_refit_uses_all_pictures_up_to_the_best_step() -> None:
    model, seen = spoilt(), list[tuple[str, int, int]]()

    def note(progress: Progress) -> None:
        seen.append((progress.stage, progress.done, progress.total))

    result = train(model, replace(CONFIG, refit=True), note)
    best = result.report.facts.best_step
    assert [stage for stage, _, _ in seen].count("training on all") == best == len(result.report.losses)
    steps_seen = {done for _, done, _ in seen}  # other stages show progress too
    assert (result.report.facts.steps_run,) * 2 == (len(steps_seen), seen[-1][1]) and seen[-1][1] == seen[-1][2]
    alone = train(model, replace(CONFIG, held_out=0.0, steps=best))
    for name, layer in alone.adapter.layers.items():
        torch.testing.assert_close(result.adapter.layers[name].lora_up, layer.lora_up)


def test_what_is_left_counts_a_second_pass_that_is_as_long_as_the_first_took_to_its_best() -> None:
    expected: dict[str, list[int]] = {"training": [], "training on all": []}

    def note(progress: Progress) -> None:
        expected[progress.stage].append(progress.total - progress.done + progress.remaining)

    report = train(spoilt(), replace(CONFIG, refit=True), note).report
    best, first, second = report.facts.best_step, expected["training"], expected["training on all"]
    assert first[:5] == [119, 118, 117, 116, 115]  # the best may still be the last
    assert first[-1] == CONFIG.steps - len(first) + best and second == list(range(len(second) - 1, -1, -1))
    seen: list[int] = []
    train(spoilt(), CONFIG, lambda progress: seen.append(progress.remaining))
    assert set(seen) == {0}


def stopped_at(step: int, model: Toy, config: TrainConfig) -> Result:
    seen: list[int] = []
    return train(model, config, lambda p: seen.append(p.done), lambda: len(seen) == step)


@pytest.mark.parametrize("step", [1, 8, 25])
def test_a_training_that_is_stopped_between_measurements_says_what_it_gives(step: int) -> None:
    result = stopped_at(step, toy(12), CONFIG)
    assert [at for at, _ in result.report.validation] == list(range(0, step + 1, 10))
    alone = replace(CONFIG, steps=step, held_out=0.0)
    plain = train(toy(12), alone, indices=hold_out(toy(12), range(12), 0.2, 0)[0])
    assert torch.equal(result.adapter.layers["toy.attn"].lora_up, plain.adapter.layers["toy.attn"].lora_up)
    told = training_summary(result.report)
    steps = "1 step" if step == 1 else f"{step} steps"
    assert told.startswith(f"Cancelled at step {step}: the LoRA is what was learned so far. {steps} on 12 images.")
    assert f"The LoRA is that of step {step}, whose loss on the 2 validation images was not measured." in told
    # Ten pictures, eight to a step: an epoch has two.
    assert result.report.facts.epochs == math.ceil(step / 2)


def test_a_measurement_that_was_stopped_is_made_when_the_training_goes_on(tmp_path: Path) -> None:
    seen, asked = list[int](), list[int]()

    def should_stop() -> bool:
        asked.append(len(seen))
        return asked.count(19) > 1  # after step 19 it goes on; then the next one is measured

    checkpoints = CheckpointConfig(tmp_path / "ink")
    stopped = train(toy(12), CONFIG, lambda p: seen.append(p.done), should_stop, checkpoints=checkpoints)
    assert len(seen) == 20 and [step for step, _ in stopped.report.validation] == [0, 10]
    resumed, whole = train(toy(12), CONFIG, checkpoints=checkpoints), train(toy(12), CONFIG)
    assert resumed.report.validation == whole.report.validation and resumed.report.losses == whole.report.losses


def test_stopped_where_it_was_measured_a_training_gives_its_best() -> None:
    told = training_summary(stopped_at(20, toy(12), CONFIG).report)
    assert "Best at step 20: loss " in told and " on 2 validation images." in told


@pytest.mark.parametrize("stage", ["cutting", "training on all"])
def test_what_fails_later_does_not_cost_what_was_found(stage: str, caplog: pytest.LogCaptureFixture) -> None:
    def fail(progress: Progress) -> None:
        if progress.stage == stage:
            raise RuntimeError("CUDA error: an illegal memory access\nmany lines of details")

    config = replace(CONFIG, refit=stage != "cutting", smallest=stage == "cutting")
    result = train(toy(16), config, fail)
    plain = train(toy(16), replace(CONFIG, refit=False, smallest=False))
    assert torch.equal(result.adapter.layers["toy.attn"].lora_up, plain.adapter.layers["toy.attn"].lora_up)
    assert "(CUDA error: an illegal memory access);" in training_summary(result.report)
    assert "many lines of details" in caplog.text and not result.report.truncations


def test_a_training_that_is_stopped_is_neither_cut_nor_refitted() -> None:
    steps: list[int] = []
    config = replace(CONFIG, refit=True, smallest=True)
    result = train(spoilt(), config, lambda progress: steps.append(progress.done), lambda: len(steps) == 20)
    assert steps == list(range(1, 21)) and not result.report.truncations and result.report.facts.best_step == 20
    assert result.adapter.layers["toy.attn"].rank == 8


def test_with_few_pictures_a_sentence_says_what_is_done_instead(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="aclora"):
        report = train(toy(7), replace(CONFIG, steps=5, batch_size=4)).report
    assert "with fewer than 8 different images none is held out" in caplog.text
    assert not report.validation and not report.truncations and report.facts.best_step is None
    assert [step for step, _ in report.fit] == [0, 5]


def test_the_same_seed_holds_out_and_chooses_the_same() -> None:
    config = replace(CONFIG, refit=True, smallest=True)
    first, again = (train(spoilt(), config) for _ in range(2))
    assert first.report.validation == again.report.validation and first.report.truncations == again.report.truncations
    for name, layer in first.adapter.layers.items():
        assert torch.equal(layer.lora_up, again.adapter.layers[name].lora_up)
