"""The stop by the fit of a training's own images: its rule, what it measures, and whole trainings that it ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aclora_core.adapter import fit_share
from aclora_core.config import CheckpointConfig, TrainConfig
from aclora_core.diffusion import Batch
from aclora_core.training.checkpoint import CheckpointStore
from aclora_core.training.fit import LEVEL, MAX_IMAGES, MIN_STEPS, FitStopping, measured_images
from aclora_core.training.fixed_noise import FixedNoiseImages
from aclora_core.training.progress import Result
from aclora_core.training.summary import training_summary
from tests.support.toy import Toy, toy, train

pytestmark = pytest.mark.usefixtures("one_thread")

# Eight of its images are measured every 40 steps. The toy's loss is below 18 % of the base model's at step 560.
CONFIG = TrainConfig(
    steps=1000,
    learning_rate=0.0004,
    batch_size=8,
    max_rank=4,
    weight_decay=0.0,
    mode="off",
    held_out=0.0,
    smallest=False,
)


def stopping(history: list[tuple[int, float]], last_restart: int = 0) -> FitStopping:
    model = toy(3)
    fit = FitStopping(FixedNoiseImages(model, model, range(3), 0), 4, 1.0)
    fit.history[:] = history
    fit.last_restart = last_restart
    return fit


@pytest.mark.parametrize(
    ("history", "stops"),
    [
        ([(0, 1.0), (MIN_STEPS, LEVEL)], True),
        ([(0, 1.0), (MIN_STEPS, LEVEL + 0.001)], False),
        ([(0, 2.0), (560, 2 * LEVEL)], True),  # a share of the model's loss, not a loss
        ([(0, 1.0), (MIN_STEPS - 1, 0.01)], False),
        ([(0, 1.0), (MIN_STEPS, 0.1), (640, 0.3)], False),  # the last measurement counts
        ([(0, 1.0), (480, 0.3), (MIN_STEPS, 0.1)], True),
        ([(0, 0.0), (640, 0.0)], False),
        ([(0, 1.0), (640, math.nan)], False),
        ([(640, 0.1)], False),
        ([(0, 0.1)], False),
        ([], False),
        ([(80, 1.0), (640, 0.1)], False),  # the model's own loss is not known
    ],
)
def test_it_stops_at_its_level_and_not_too_early(history: list[tuple[int, float]], stops: bool) -> None:
    assert stopping(history).ends_training() is stops


@pytest.mark.parametrize(("last_restart", "stops"), [(440, True), (441, False), (719, False)])
def test_it_does_not_stop_soon_after_a_restart(last_restart: int, stops: bool) -> None:
    assert stopping([(0, 1.0), (720, 0.1)], last_restart).ends_training() is stops


def test_it_says_what_is_left() -> None:
    fit = stopping([(0, 0.5), (480, 0.08)])
    assert fit.share == pytest.approx(0.16)
    assert fit.reason == "the loss of its training images has fallen to 16 % of the base model's"


def test_the_measured_images_are_a_few_drawn_by_the_seed() -> None:
    model, indices = toy(50), list(range(10, 50))
    choices = [measured_images(model, indices, seed) for seed in range(6)]
    assert all(len(set(it)) == MAX_IMAGES and set(it) <= set(indices) and it == sorted(it) for it in choices)
    assert len(set(map(tuple, choices))) == 6 and measured_images(model, indices, 3) == choices[3]
    assert measured_images(model, [4, 7, 9], 0) == [4, 7, 9]


def test_repeats_of_an_image_are_measured_once() -> None:
    pictures = toy(10).latents
    model = toy(40, latents=[picture for picture in pictures for _ in range(4)])
    train(model, replace(CONFIG, steps=4))
    measured = {index for call in model.measured for index in call}
    assert len(measured) == len({index // 4 for index in measured}) == MAX_IMAGES
    assert measured == {4 * index for index in measured_images(toy(10), range(10), CONFIG.seed)}  # as without repeats


def test_regularisation_images_and_further_variants_are_not_measured() -> None:
    """The first ten images have two variants each, of which the first is the image; four are for regularisation."""
    variants = {2 * image: [2 * image, 2 * image + 1] for image in range(10)}
    variants |= {image: [image] for image in range(20, 24)}
    model = toy(24, variants=variants, regularisation=dict.fromkeys(range(20, 24), 1.0))
    train(model, replace(CONFIG, steps=4))
    measured = {index for call in model.measured for index in call}
    assert measured == set(measured_images(model, range(0, 20, 2), CONFIG.seed)) and len(measured) == 8
    learned = {index for call in model.learned for index in call}
    assert learned & set(range(20, 24)) and learned & set(range(1, 20, 2))  # they are there to be learned from


def assert_same(result: Result, other: Result) -> None:
    assert result.report.losses == other.report.losses and result.report.fit == other.report.fit
    for name, layer in other.adapter.layers.items():
        assert torch.equal(result.adapter.layers[name].lora_down, layer.lora_down)
        assert torch.equal(result.adapter.layers[name].lora_up, layer.lora_up)


@pytest.fixture(scope="module")
def whole() -> Result:
    return train(toy(), CONFIG)


def test_a_training_ends_where_it_fits_its_images(whole: Result) -> None:
    fit, steps = whole.report.fit, len(whole.report.losses)
    assert [step for step, _ in fit] == list(range(0, steps + 1, 40)) and MIN_STEPS <= steps < CONFIG.steps
    shares = [loss / fit[0][1] for _, loss in fit]
    assert shares[-1] <= LEVEL < shares[-2]
    assert whole.report.facts.steps_run == steps and whole.report.facts.validation_seconds > 0
    assert whole.report.facts.best_step is None and not whole.report.validation
    fell = f"the loss of its training images fell to {100 * shares[-1]:.0f} %"
    told = f"{steps} steps on 48 images. Stopped by itself: {fell}"
    assert training_summary(whole.report).startswith(told + " of the base model's.")


def test_the_measurements_are_those_of_the_given_adapter(whole: Result) -> None:
    """At the last step against the loss of a model with the adapter in its weights; the first is the model's own."""
    layer = whole.adapter.layers["toy.attn"]
    own = toy()
    indices = measured_images(own, range(48), CONFIG.seed)
    unlearned = FixedNoiseImages(own, own, indices, CONFIG.seed).losses().mean()
    merged = toy(error=own.error - layer.scale * layer.lora_up @ layer.lora_down)
    left = FixedNoiseImages(merged, merged, indices, CONFIG.seed).losses().mean()
    assert fit_share(whole.report.fit) == pytest.approx(float(left / unlearned), rel=1e-3)


def test_a_training_that_may_not_stop_goes_on_to_its_last_step(whole: Result) -> None:
    report = train(toy(), replace(CONFIG, steps=700, stop_early=False)).report
    assert len(report.losses) == 700 and report.losses[: len(whole.report.losses)] == whole.report.losses
    assert report.fit[-1][0] == 700 and report.fit[: len(whole.report.fit)] == whole.report.fit
    assert "It ran to its last step: the loss of its training images fell to" in training_summary(report)


def test_fewer_than_eight_images_are_all_measured_and_end_a_training_too() -> None:
    model = toy(3)
    report = train(model, replace(CONFIG, batch_size=3, learning_rate=0.01)).report
    assert {index for call in model.measured for index in call} == {0, 1, 2}
    assert len(report.losses) == report.fit[-1][0] == MIN_STEPS


def test_a_restart_puts_the_end_off() -> None:
    config = replace(CONFIG, learning_rate=0.01, mode="paper", restart_steps=400, fixed_threshold=0.99)
    report = train(toy(), replace(config, threshold="fixed")).report
    assert [restart.step for restart in report.restarts] == [400]
    assert len(report.losses) == 680  # the first measurement that is 280 steps after it


def stopped_at(step: int, folder: Path, config: TrainConfig = CONFIG) -> Result:
    seen: list[int] = []
    checkpoints = CheckpointConfig(folder, every=10_000)
    return train(toy(), config, lambda p: seen.append(p.done), lambda: seen[-1:] == [step], checkpoints=checkpoints)


def resumed(folder: Path, config: TrainConfig = CONFIG, **more: Any) -> Result:
    return train(toy(), config, checkpoints=CheckpointConfig(folder, every=10_000, **more))


@pytest.mark.parametrize("step", [1, 100, 480, 500])
def test_a_resumed_training_ends_at_the_same_step_with_the_same_bits(tmp_path: Path, whole: Result, step: int) -> None:
    stopped = stopped_at(step, tmp_path)
    assert len(stopped.report.losses) == step and stopped.report.fit == whole.report.fit[: step // 40 + 1]
    assert_same(resumed(tmp_path), whole)


def test_averages_are_measured_and_resumed_too(tmp_path: Path) -> None:
    config = replace(CONFIG, learning_rate=0.004, ema_decay=0.9)
    stopped_at(130, tmp_path, config)
    assert_same(resumed(tmp_path, config), train(toy(), config))


def test_a_restart_is_remembered_by_a_resumed_training(tmp_path: Path) -> None:
    config = replace(CONFIG, learning_rate=0.01, mode="paper", restart_steps=400, threshold="fixed")
    stopped_at(500, tmp_path, config)
    assert_same(resumed(tmp_path, config), train(toy(), config))


def test_a_checkpoint_without_measurements_is_resumed(
    tmp_path: Path, whole: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As version 0.3.0 wrote them. The model is measured again, and the training ends where it would have."""
    write = CheckpointStore.write

    def write_without(store: CheckpointStore, name: Any, step: int, state: dict[str, Any]) -> str:
        return write(store, name, step, {key: value for key, value in state.items() if key != "fit"})

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "write", write_without)
        stopped_at(100, tmp_path)
    found = resumed(tmp_path)
    assert found.report.fit == [whole.report.fit[0], *whole.report.fit[3:]]
    assert found.report.losses == whole.report.losses
    assert torch.equal(found.adapter.layers["toy.attn"].lora_up, whole.adapter.layers["toy.attn"].lora_up)


def cancelled_in_a_measurement(step: int) -> Callable[[], bool]:
    """Cancel while the measurement after this step runs, or before the first step; asked after each step before."""
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        measurements = 4 * math.ceil(step / 40)  # of four levels each, before this one
        return asked > measurements + step + 1

    return should_stop


@pytest.mark.parametrize("step", [0, 80])
def test_a_measurement_that_was_cancelled_is_made_when_the_training_goes_on(
    tmp_path: Path, whole: Result, step: int
) -> None:
    checkpoints = CheckpointConfig(tmp_path, every=10_000)
    stopped = train(toy(), CONFIG, should_stop=cancelled_in_a_measurement(step), checkpoints=checkpoints)
    assert len(stopped.report.losses) == max(step, 1) and stopped.report.fit == whole.report.fit[: step // 40]
    assert (
        stopped.report.facts.cancelled == "training" and "training images" not in training_summary(stopped.report)[:100]
    )
    assert_same(resumed(tmp_path), whole)


def test_more_steps_of_a_training_that_fits_its_images_need_a_word(tmp_path: Path, whole: Result) -> None:
    resumed(tmp_path)
    steps = len(whole.report.losses)
    reason = r"the loss of its training images has fallen to 1\d % of the base model's\. .*switch stop_early off"
    with pytest.raises(ValueError, match=rf"stopped by itself at step {steps}: {reason}"):
        resumed(tmp_path, replace(CONFIG, steps=1200), resume="for more steps")
    config = replace(CONFIG, steps=steps + 100, stop_early=False)
    longer = resumed(tmp_path, replace(config, steps=1100), resume="for more steps").report
    assert len(longer.losses) == 1100 and longer.losses[:steps] == whole.report.losses


def test_a_loss_that_is_no_number_neither_ends_a_training_nor_is_told() -> None:
    calls = 1 + 480 + 12 * 4  # the trial run, the steps up to 480, and the measurements before the last of them
    model = toy(spoil=lambda call: call == calls)
    report = train(model, replace(CONFIG, steps=500, learning_rate=0.01)).report
    assert math.isnan(dict(report.fit)[480]) and len(report.losses) == 500
    assert fit_share(report.fit[:-1]) is None


def test_a_model_that_is_right_about_its_images_is_trained_to_the_end() -> None:
    model: Toy = toy(error=torch.zeros(16, 16))
    report = train(model, replace(CONFIG, steps=500)).report
    assert report.fit[0][1] == 0.0 and len(report.losses) == 500 and "training images" not in training_summary(report)


def test_the_last_good_weights_are_measured_with_fewer_images_at_a_time_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loss becomes NaN; nothing of the adapter that is restored then may be lost for want of memory."""
    model = toy(8, spoil_step=lambda call: call > 12)
    rows: list[int] = []
    losses_of = FixedNoiseImages._losses_of

    def full(images: FixedNoiseImages, batch: Batch) -> torch.Tensor:
        if len(model.learned) > 12:
            rows.append(len(batch.sigma))
            if len(batch.sigma) > 2:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return losses_of(images, batch)

    monkeypatch.setattr(FixedNoiseImages, "_losses_of", full)
    result = train(model, TrainConfig(steps=60, batch_size=4, max_rank=2, layers="attention"))
    assert "loss has not been a finite number" in result.report.facts.notes
    assert "images go through the model 2 at a time" in result.report.facts.notes and min(rows) == 2
