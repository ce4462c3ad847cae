"""Training on small linear models: it finds what there is to find, restarts on schedule, and stops when told to."""

import inspect
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aclora_core.adapter.rank_report import RankReport
from aclora_core.config.checkpoints import CheckpointConfig
from aclora_core.config.train_config import TrainConfig
from aclora_core.method import dynamic_threshold
from aclora_core.optim.lr_schedule import learning_rate_at
from aclora_core.training import warmup
from aclora_core.training.progress import Progress
from aclora_core.training.summary import training_summary
from aclora_core.training.trainer import Trainer
from tests.support.toy import FLOW, WIDTH, planted, toy, train

pytestmark = pytest.mark.usefixtures("one_thread")


QUICK = TrainConfig(
    steps=12,
    learning_rate=0.01,
    batch_size=4,
    max_rank=4,
    mode="off",
    threshold="dynamic",
    held_out=0.0,
    smallest=False,
)
THOROUGH = TrainConfig(
    steps=120,
    learning_rate=0.05,
    batch_size=48,
    max_rank=8,
    alpha=8.0,
    weight_decay=0.0,
    mode="off",
    threshold="dynamic",
    held_out=0.0,
    smallest=False,
)


def tensors(result) -> list[Tensor]:
    return [tensor for layer in result.adapter.layers.values() for tensor in (layer.lora_down, layer.lora_up)]


def test_training_finds_an_update_of_rank_two() -> None:
    model = toy()
    result = train(model, THOROUGH)
    losses, spectrum = result.report.losses, result.report.spectrum["toy.attn"]
    assert losses[0] > 0.4 and max(losses[-5:]) < 1e-4
    down, up = result.adapter.layers["toy.attn"].factors()
    torch.testing.assert_close(result.adapter.layers["toy.attn"].scale * up @ down, model.error, rtol=0, atol=0.01)
    assert spectrum == pytest.approx([2.0, 1.6, 0, 0, 0, 0, 0, 0], abs=0.01)
    assert result.report.signal == {"toy.attn": 2}


@pytest.mark.parametrize("mode", ["paper", "product", "product_redraw"])
def test_restarts_do_not_lose_what_was_found(mode) -> None:
    """The threshold stops at 95 %, so that the second component is signal and the trace of the others is not."""
    model = toy()
    result = train(model, replace(THOROUGH, mode=mode, restart_every=30, highest_threshold=0.95))
    report, spectrum = result.report, result.report.spectrum["toy.attn"]
    assert [restart.step for restart in report.restarts] == [30, 60, 90]
    assert report.losses[-1] < 0.02 * report.losses[0]
    assert sum(value > 0.1 * spectrum[0] for value in spectrum) == 2 and report.signal == {"toy.attn": 2}
    down, up = result.adapter.layers["toy.attn"].factors()
    torch.testing.assert_close(result.adapter.layers["toy.attn"].scale * up @ down, model.error, rtol=0, atol=0.15)


@pytest.mark.parametrize("mode", ["off", "paper", "product", "product_redraw"])
def test_the_same_seed_gives_the_same_adapter_bit_for_bit(mode) -> None:
    config = replace(QUICK, steps=60, restart_every=2, mode=mode)
    first, again, other = (train(toy(objective=FLOW, count=12), replace(config, seed=seed)) for seed in (5, 5, 6))
    assert bool(first.report.restarts) is (mode != "off")
    assert first.report.losses == again.report.losses != other.report.losses
    for one, same, different in zip(tensors(first), tensors(again), tensors(other), strict=True):
        assert torch.equal(one, same) and not torch.equal(one, different)


def test_other_random_numbers_neither_disturb_nor_are_disturbed() -> None:
    model = toy(objective=FLOW)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = train(model, QUICK)
    assert torch.equal(torch.rand(1), expected)
    torch.manual_seed(2)
    assert torch.equal(tensors(train(model, QUICK))[1], tensors(first)[1])


def test_the_model_is_left_as_it_was() -> None:
    model = toy()
    layer = model.network["attn"]
    before = layer.weight.clone()
    train(model, QUICK)
    assert torch.equal(layer.weight, before) and layer.weight.grad is None and not layer._forward_hooks

    def fail(progress: Progress) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        train(model, QUICK, fail)
    assert torch.equal(layer.weight, before) and not layer._forward_hooks


@pytest.mark.parametrize(
    ("steps", "pictures", "every", "expected"),
    [
        (30, 12, 2, [6, 12, 18, 24]),  # 3 steps an epoch, 10 epochs: none after the last
        (32, 12, 2, [6, 12, 18, 24]),  # the eleventh epoch is not finished
        (29, 12, 2, [6, 12, 18]),  # 9 epochs: after the eighth no full interval follows
        (30, 12, 5, [15]),
        (30, 12, 6, []),
        (5, 4, 1, [1, 2, 3, 4]),
        (30, 48, 10, []),  # less than three epochs
    ],
)
def test_restarts_come_every_interval_but_not_in_the_last(steps, pictures, every, expected) -> None:
    config = replace(QUICK, steps=steps, mode="paper", restart_every=every)
    report = train(toy(pictures), config).report
    assert [restart.step for restart in report.restarts] == expected
    per_epoch = math.ceil(pictures / config.batch_size)
    assert [restart.epoch * per_epoch for restart in report.restarts] == expected
    assert all(steps - step >= every * per_epoch for step in expected)


def test_the_threshold_follows_the_loss_since_the_last_restart() -> None:
    report = train(toy(12), replace(QUICK, steps=30, mode="paper", restart_every=2)).report
    start = 0
    for restart in report.restarts:
        loss = sum(report.losses[start : restart.step]) / (restart.step - start)
        assert restart.loss == pytest.approx(loss)
        assert restart.threshold == pytest.approx(dynamic_threshold(loss, restart.epoch, 10))
        assert set(restart.layers) == {"toy.attn"}
        start = restart.step


def test_the_threshold_stays_in_its_range() -> None:
    config = replace(QUICK, steps=30, mode="paper", restart_every=2, lowest_threshold=0.97, highest_threshold=0.98)
    thresholds = [restart.threshold for restart in train(toy(12), config).report.restarts]
    assert thresholds and set(thresholds) == {0.97}


def test_a_scheduled_threshold_rises_linearly_over_the_training() -> None:
    config = replace(
        QUICK,
        steps=30,
        mode="paper",
        restart_every=2,
        threshold="scheduled",
        lowest_threshold=0.7,
        highest_threshold=0.99,
    )
    by_epoch = train(toy(12), config).report.restarts
    assert [restart.threshold for restart in by_epoch] == pytest.approx([0.7 + 0.29 * n / 10 for n in (2, 4, 6, 8)])
    by_step = train(toy(12), replace(config, restart_steps=7)).report.restarts
    assert [restart.threshold for restart in by_step] == pytest.approx([0.7 + 0.29 * n / 30 for n in (7, 14, 21)])


@pytest.mark.parametrize(
    ("steps", "every", "expected"), [(30, 7, [7, 14, 21]), (28, 7, [7, 14, 21]), (27, 7, [7, 14]), (30, 16, [])]
)
def test_restarts_counted_in_steps_come_wherever_an_epoch_ends_but_not_in_the_last_interval(
    steps, every, expected
) -> None:
    config = replace(QUICK, steps=steps, mode="paper", restart_every=1, restart_steps=every)
    restarts = train(toy(12), config).report.restarts  # 3 steps an epoch
    assert [restart.step for restart in restarts] == expected
    assert [restart.epoch for restart in restarts] == [math.ceil(step / 3) for step in expected]


def test_restarts_counted_in_steps_take_the_exponent_of_the_threshold_from_the_steps() -> None:
    for restart in train(toy(12), replace(QUICK, steps=30, mode="paper", restart_steps=7)).report.restarts:
        assert restart.threshold == pytest.approx(dynamic_threshold(restart.loss, restart.step, 30))


def test_the_refit_restarts_at_the_steps_of_the_first_pass() -> None:
    """Its epochs are longer, as it learns from the held-out images too; steps are the same in both."""
    config = replace(QUICK, steps=40, mode="paper", restart_steps=7, held_out=0.2, stop_early=False)
    seen: dict[str, list[int]] = {}

    def watch(progress) -> None:
        seen[progress.stage] = [restart.step for restart in progress.restarts]

    report = train(toy(24), config, watch).report
    last = report.facts.best_step
    assert seen["training"] == [7, 14, 21, 28] and last >= 14
    assert seen["training on all"] == [step for step in seen["training"] if step <= last - 7]


def test_losses_are_relative_to_predicting_the_mean() -> None:
    """So pictures of ten times the contrast give the same losses at the start."""
    faint = toy()
    strong = toy(latents=[10 * latent for latent in faint.latents])
    first, second = (train(model, QUICK).report.losses[0] for model in (faint, strong))
    assert first == pytest.approx(second, rel=1e-4)
    nothing = toy(400, error=torch.eye(WIDTH))  # a model that always answers 0, the mean of such pictures
    assert train(nothing, replace(QUICK, steps=1, batch_size=400)).report.losses[0] == pytest.approx(1, abs=0.01)


def test_every_picture_is_used_alike_and_only_beside_its_like() -> None:
    model = toy(10, batch_keys=["wide"] * 4 + ["tall"] * 6)
    result = train(model, replace(QUICK, steps=10, batch_size=4))
    assert sorted(number for call in model.learned[1:4] for number in call) == list(range(10))
    assert all(max(call) < 4 or min(call) >= 4 for call in model.learned)
    assert result.report.facts.epochs == 4 and result.report.facts.images == 10


@pytest.mark.parametrize("stop_at", [1, 5])
def test_a_cancel_gives_what_was_learned_so_far(stop_at: int) -> None:
    seen: list[int] = []
    result = train(toy(), QUICK, lambda progress: seen.append(len(progress.losses)), lambda: len(seen) == stop_at)
    assert seen == list(range(1, stop_at + 1)) and len(result.report.losses) == stop_at
    whole = train(toy(), replace(QUICK, steps=stop_at))
    for stopped, ended in zip(tensors(result), tensors(whole), strict=True):
        assert torch.equal(stopped, ended)
    assert result.adapter.layers["toy.attn"].lora_up.any()


@pytest.mark.parametrize("steps", [1, 9])
@pytest.mark.parametrize("settings", [{}, {"held_out": 0.2}, {"ema_decay": 0.5}], ids=["plain", "held out", "EMA"])
def test_a_training_in_which_no_step_counted_is_an_error(steps: int, settings: dict[str, Any]) -> None:
    model = toy(spoil_step=lambda call: call > 0)
    with pytest.raises(FloatingPointError, match="Nothing was learned: in .* never a finite number. Load the model in"):
        train(model, replace(QUICK, steps=steps, **settings))


def test_a_cancelled_training_in_which_no_step_counted_is_told_as_a_failure() -> None:
    seen: list[int] = []
    model = toy(spoil_step=lambda call: call > 0)
    result = train(model, QUICK, lambda p: seen.append(p.step), lambda: len(seen) == 3)
    assert not result.adapter.layers["toy.attn"].lora_up.any()
    assert result.report.signal == {"toy.attn": 1} and result.report.spectrum == {"toy.attn": [0.0] * 4}
    told = "Cancelled at step 3: the LoRA is what was learned so far. It learned nothing: none of its 3 steps counted"
    assert training_summary(result.report).startswith(told)


def test_an_adapter_whose_numbers_are_not_finite_is_never_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step may be the one that spoils it, and no loss comes after it."""
    real = Trainer.is_finite.fget  # type: ignore[attr-defined]

    def spoiled(trainer: Trainer) -> bool:
        with torch.no_grad():
            trainer.adapted.parameters.master[0] = math.inf
        return bool(real(trainer))

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "is_finite", property(spoiled))
        result = train(toy(), QUICK)
    for given, expected in zip(tensors(result), tensors(train(toy(), replace(QUICK, steps=11))), strict=True):
        assert torch.equal(given, expected)
    assert "The LoRA's weights are not finite after step 12, so training ended" in result.report.facts.notes


def test_an_image_that_spoils_every_step_is_named() -> None:
    model = toy(12)
    model.spoil_step = lambda call: call > 0 and 4 in model.calls[-1]
    notes = train(model, replace(QUICK, steps=60)).report.facts.notes
    assert notes.startswith("Image 5 and its caption could not be learned: every step with them was skipped")
    assert "could not be learned" not in train(toy(12), replace(QUICK, steps=60)).report.facts.notes


def test_a_loss_worse_than_the_mean_makes_the_threshold_zero_and_one_component_signal() -> None:
    model = toy(12, error=planted(2, 9.0))
    report = train(model, replace(QUICK, steps=9, learning_rate=1e-5, mode="paper", restart_every=1)).report
    assert {restart.threshold for restart in report.restarts} == {0.0}
    assert report.signal == {"toy.attn": 1}


def test_after_ten_losses_in_a_row_that_are_no_numbers_the_last_good_state_is_given(caplog) -> None:
    """Step 3 was the last whose loss was a number; what came of it may be what spoils the others."""
    seen: list[float] = []
    model = toy(spoil_step=lambda call: call > 3)
    result = train(model, replace(QUICK, steps=50), lambda p: seen.append(p.losses[-1]))
    assert len(seen) == 12 and not any(map(math.isnan, seen[:3])) and all(map(math.isnan, seen[3:]))
    assert len(result.report.losses) == 13
    for given, expected in zip(tensors(result), tensors(train(toy(), replace(QUICK, steps=2))), strict=True):
        assert torch.equal(given, expected)
    sentence = "for 10 steps, up to step 13, so training ended there; what had been learned before is kept. Lower the"
    assert sentence in caplog.text and sentence in result.report.facts.notes
    assert sentence in training_summary(result.report)
    assert "Steps skipped because their loss was not finite: 10." in training_summary(result.report)
    assert caplog.text.count("step 4 was skipped") == 1 and "step 5 was skipped" not in caplog.text


def test_the_log_says_what_is_learned_and_how(caplog) -> None:
    with caplog.at_level("INFO", logger="aclora"):
        train(toy(), replace(QUICK, steps=2, batch_size=3, accumulate=2, optimizer="SGD", learning_rate=0.003))
    assert "up to 2 steps of 3 images × 2; SGD, learning rate 0.003 (constant)" in caplog.text
    assert "this model predicts" in caplog.text and "loss weights: none" in caplog.text


def test_without_one_good_step_there_is_nothing_to_give() -> None:
    with pytest.raises(FloatingPointError, match=r"for 10 steps, up to step 10\. Load the model in bf16 or fp32"):
        train(toy(spoil_step=lambda call: call > 0), replace(QUICK, steps=50))


def test_a_best_step_is_given_when_later_losses_are_no_numbers() -> None:
    """The adapter of the first pass, that is, when it happens in the second: half of a refit is worse."""
    config = replace(QUICK, steps=24, batch_size=8, held_out=0.2, smallest=True)
    whole, calls = toy(16), []
    first = train(toy(16), replace(config, refit=False))
    train(whole, config, lambda p: calls.append((p.stage, len(whole.learned))))
    refit = next(call for stage, call in calls if stage == "training on all")
    result = train(toy(16, spoil_step=lambda call: call >= refit + 3), config)
    for given, expected in zip(tensors(result), tensors(first), strict=True):
        assert torch.equal(given, expected)
    assert result.report.losses == first.report.losses and "10 steps" in result.report.facts.notes


def test_nine_bad_steps_are_left_out_and_reported() -> None:
    result = train(toy(spoil_step=lambda call: 3 < call < 13), replace(QUICK, steps=20))
    bad = [step for step, loss in enumerate(result.report.losses, start=1) if math.isnan(loss)]
    assert bad == list(range(4, 13))
    assert all(torch.isfinite(tensor).all() for tensor in tensors(result))
    again = RankReport.from_json(result.report.to_json())
    assert math.isnan(again.losses[3]) and again.losses[:3] == result.report.losses[:3]


def test_a_restart_leaves_out_losses_that_are_no_numbers() -> None:
    config = replace(QUICK, steps=30, mode="paper", restart_every=2)
    report = train(toy(12, spoil_step=lambda call: call in (2, 8)), config).report
    assert [restart.step for restart in report.restarts] == [6, 12, 18, 24]
    good = [loss for loss in report.losses[:6] if math.isfinite(loss)]
    assert len(good) == 5 and report.restarts[0].loss == pytest.approx(sum(good) / 5)


def test_an_interval_without_any_good_loss_has_no_restart() -> None:
    config = replace(QUICK, steps=10, mode="paper", restart_every=1)
    report = train(toy(4, spoil_step=lambda call: call in (1, 4)), config).report
    assert [restart.step for restart in report.restarts] == [2, 3, 5, 6, 7, 8, 9]


def test_moments_of_redrawn_factors_are_forgotten_only_if_wished() -> None:
    config = replace(QUICK, steps=30, mode="product", restart_every=2, highest_threshold=0.9)
    forgot, kept = (train(toy(12), replace(config, clear_moments=clear)) for clear in (True, False))
    assert forgot.report.losses[:6] == kept.report.losses[:6]
    assert forgot.report.losses[7:] != kept.report.losses[7:]


def test_the_report_tells_how_it_was_made() -> None:
    report = train(toy(12), replace(QUICK, steps=30, mode="paper", restart_every=2)).report
    for name in ("steps", "learning_rate", "batch_size", "max_rank", "seed", "mode"):
        assert name in report.settings
    assert report.facts.started_at <= report.facts.finished_at
    assert report.settings["optimizer"] == "AdamW"
    assert json.loads(report.to_json())["settings"]["restart_every"] == 2
    down, up = train(toy(12), QUICK).adapter.layers["toy.attn"].factors()
    expected = torch.linalg.svdvals(2.0 * up.double() @ down.double())[:4]
    torch.testing.assert_close(
        torch.tensor(train(toy(12), QUICK).report.spectrum["toy.attn"]).double(), expected, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(("measure", "power", "expected"), [("energy", 2, 3), ("sum", 1, 4)])
def test_signal_is_counted_by_the_measure_that_restarts_went_by(measure, power: int, expected: int) -> None:
    share = {"lowest_threshold": 0.85, "highest_threshold": 0.85}
    config = replace(THOROUGH, steps=80, mode="product", measure=measure, restart_every=30, **share)
    report = train(toy(error=planted(4)), config).report
    weights = torch.tensor(report.spectrum["toy.attn"]) ** power
    assert report.signal == {"toy.attn": 1 + int((weights.cumsum(0) < 0.85 * weights.sum()).sum())}
    assert report.signal == {"toy.attn": expected}


BAD: list[tuple[dict, str]] = [
    ({"steps": 0}, "steps must be 1 or more, but is 0"),
    ({"batch_size": 0}, "batch_size must be 1 or more, but is 0"),
    ({"max_rank": -1}, "max_rank must be 1 or more, but is -1"),
    ({"restart_every": 0}, "restart_every must be 1 or more"),
    ({"restart_steps": -1}, "restart_steps must be 0"),
    ({"learning_rate": 0.0}, "learning_rate must be above 0, but is 0.0"),
    ({"learning_rate": math.nan}, "learning_rate must be above 0, but is nan"),
    ({"alpha": -1.0}, "alpha must be above 0, but is -1.0"),
    ({"max_norm": math.inf}, "max_norm must be above 0, but is inf"),
    ({"weight_decay": -0.1}, "weight_decay"),
    ({"lowest_threshold": 0.6, "highest_threshold": 0.4}, "is 0.6 to 0.4"),
    ({"highest_threshold": 1.5}, "0.0 to 1.5"),
    ({"mode": "fast"}, "paper, product, product_redraw or off, but is 'fast'"),
    ({"measure": "area"}, "energy.*sum.*'area'"),
    ({"layers": "some"}, "attention.*all.*'some'"),
]


@pytest.mark.parametrize(
    ("changes", "message"), BAD, ids=lambda value: next(iter(value)) if type(value) is dict else ""
)
def test_settings_out_of_range_are_refused_when_made(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_what_cannot_be_trained_is_refused_before_it_starts() -> None:
    seen: list[Progress] = []
    with pytest.raises(ValueError, match="no images"):
        train(toy(0), QUICK, seen.append)
    empty = toy()
    empty.network = nn.ModuleDict({"norm": nn.LayerNorm(4)})
    with pytest.raises(ValueError, match="no linear layer"):
        train(empty, QUICK, seen.append)
    with pytest.raises(ValueError, match=f"can only have rank {WIDTH}"):
        train(toy(), replace(QUICK, max_rank=WIDTH + 1), seen.append)
    assert not seen


@pytest.mark.parametrize("pictures", [12, 10])
def test_gradients_of_small_batches_add_up_to_those_of_a_large_one(pictures: int) -> None:
    """n × 1 is 1 × n, also in the smaller step at the end of an epoch, and across restarts and held-out pictures."""
    config = replace(QUICK, steps=40, mode="product", restart_every=3, held_out=0.2, highest_threshold=0.9)
    ways = [replace(config, batch_size=size, accumulate=4 // size) for size in (4, 2, 1)]
    once, *others = (train(toy(pictures, objective=FLOW), way) for way in ways)
    assert once.report.restarts and once.report.validation
    for other in others:
        assert other.report.losses == pytest.approx(once.report.losses, rel=1e-4)
        assert [restart.step for restart in other.report.restarts] == [restart.step for restart in once.report.restarts]
        assert [step for step, _ in other.report.validation] == [step for step, _ in once.report.validation]
        assert other.report.facts.epochs == once.report.facts.epochs
        for found, expected in zip(tensors(other), tensors(once), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_pictures_that_are_all_different_share_a_step() -> None:
    model = toy(8, batch_keys=list(range(8)))
    report = train(model, replace(QUICK, steps=4, batch_size=4)).report
    assert report.facts.epochs == 2 and len(model.learned) == 1 + 4 * 4


def test_the_learning_rate_follows_its_schedule_and_is_told() -> None:
    seen: list[float] = []
    train(toy(), replace(QUICK, steps=10, schedule="cosine", warm_up=4), lambda p: seen.append(p.learning_rate))
    assert (
        seen == pytest.approx([learning_rate_at(step, 10, 0.01, "cosine", 4) for step in range(10)]) and seen[3] == 0.01
    )


def test_the_second_pass_learns_at_the_rates_of_the_first() -> None:
    seen: dict[str, list[float]] = {}
    config = replace(QUICK, steps=24, batch_size=8, held_out=0.2, schedule="linear")
    train(toy(16), config, lambda p: seen.setdefault(p.stage, []).append(p.learning_rate))
    again = seen["training on all"]
    assert 0 < len(again) <= 24 and again == seen["training"][: len(again)]


def test_the_average_of_the_last_steps_is_given_and_measured() -> None:
    """With no held-out pictures against a loop over what the steps left; the steps themselves are as without."""
    config = replace(QUICK, steps=30, ema_decay=0.7)
    plain, averaged = train(toy(), replace(config, ema_decay=0.0)), train(toy(), config)
    assert averaged.report.losses == plain.report.losses
    expected = [torch.zeros_like(tensor) for tensor in tensors(plain)]
    for count in range(31):
        now = tensors(train(toy(), replace(config, steps=count, ema_decay=0.0))) if count else None
        if now is None:
            start = train(toy(), replace(config, steps=1, learning_rate=1e-30, weight_decay=0.0))
            expected = tensors(start)
            continue
        share = min(0.7, (1 + count) / (10 + count))
        expected = [share * old + (1 - share) * new for old, new in zip(expected, now, strict=True)]
    for found, wanted in zip(tensors(averaged), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["paper", "product"])
def test_an_average_across_restarts_and_with_pictures_held_out_finds_the_update_too(mode) -> None:
    config = replace(
        THOROUGH,
        batch_size=16,
        held_out=0.2,
        ema_decay=0.9,
        mode=mode,
        restart_every=10,
        highest_threshold=0.95,
        refit=False,
    )
    plain, averaged = (train(toy(), replace(config, ema_decay=decay)).report for decay in (0.0, 0.9))
    assert averaged.restarts and averaged.losses[:10] == plain.losses[:10]
    assert averaged.validation != plain.validation and min(loss for _, loss in averaged.validation) < 0.05


def test_after_bad_losses_the_average_is_that_of_the_last_good_steps() -> None:
    config = replace(QUICK, steps=50, ema_decay=0.5)
    given = train(toy(spoil_step=lambda call: call > 5), config)
    for found, expected in zip(tensors(given), tensors(train(toy(), replace(config, steps=4))), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("optimizer", "rate", "package"),
    [
        ("SGD", 0.5, "torch"),
        ("Adafactor", 0.05, "torch"),
        ("Prodigy", 1.0, "prodigyopt"),
        ("AdamWScheduleFree", 0.1, "schedulefree"),
        ("AdamW8bit", 0.05, "bitsandbytes"),
    ],
)
def test_every_optimizer_finds_the_update_across_restarts(optimizer, rate: float, package: str) -> None:
    pytest.importorskip(package)
    config = replace(
        THOROUGH,
        steps=150,
        optimizer=optimizer,
        learning_rate=rate,
        batch_size=16,
        held_out=0.2,
        refit=False,
        mode="product",
        restart_every=10,
        highest_threshold=0.99,
    )
    report = train(toy(), config).report
    assert report.restarts and report.settings["optimizer"] == optimizer
    assert min(loss for _, loss in report.validation) < 0.1 * report.validation[0][1]


def test_loss_weights_change_what_is_learned_but_not_what_is_told() -> None:
    """The first loss, before anything is learned, is the same; and so is what the threshold goes by."""
    plain, weighted = (train(toy(objective=FLOW), replace(QUICK, loss_weight=kind)) for kind in ("none", "debiased"))
    assert plain.report.losses[0] == weighted.report.losses[0]
    assert plain.report.losses[1:] != weighted.report.losses[1:]
    down, up = (tensors(result)[1] for result in (plain, weighted))
    assert not torch.equal(down, up)


def test_the_log_says_what_was_chosen(caplog) -> None:
    with caplog.at_level(logging.INFO, logger="aclora"):
        train(toy(objective=FLOW), QUICK)
        train(toy(objective=FLOW), replace(QUICK, timesteps="uniform", loss_weight="min-SNR"))
    assert "timesteps are drawn logit-normal (automatic), loss weights: none." in caplog.text
    assert "timesteps are drawn uniform, loss weights: min-SNR." in caplog.text


def test_timesteps_as_wished_give_another_unit() -> None:
    """What losses are divided by is of the noise levels that are drawn."""
    automatic, same, other = (
        train(toy(objective=FLOW), replace(QUICK, timesteps=how)).report.losses
        for how in ("automatic", "logit-normal", "uniform")
    )
    assert automatic == same and automatic[0] != other[0]


def test_layers_and_ranks_follow_their_patterns() -> None:
    model = toy()
    model.network["mlp"] = nn.Linear(WIDTH, WIDTH)
    config = replace(QUICK, include_layers="attn\nmlp", layer_ranks="attn=2", layers="all")
    layers = train(model, config).adapter.layers
    assert {name: layer.rank for name, layer in layers.items()} == {"toy.attn": 2, "toy.mlp": 4}
    assert {layer.scale for layer in layers.values()} == {2.0}
    assert set(train(model, replace(config, exclude_layers="mlp")).adapter.layers) == {"toy.attn"}


def test_float16_is_learned_without_losing_steps() -> None:
    """The first scale is far too large for these gradients; no step is left out for that."""
    model, exact = toy(dtype=torch.float16), toy()
    model.network.half()
    denoise = model.denoise
    model.denoise = lambda noisy, sigma, condition: denoise(noisy.half(), sigma, condition).float()
    config = replace(THOROUGH, steps=60)
    losses, expected = train(model, config).report.losses, train(exact, config).report.losses
    assert all(map(math.isfinite, losses)) and losses[0] == pytest.approx(expected[0], rel=1e-2)
    assert losses[-1] < 0.01 * losses[0]


MORE_BAD: list[tuple[dict, str]] = [
    ({"accumulate": 0}, "accumulate must be 1 or more, but is 0"),
    ({"warm_up": -1, "steps": 600}, "warm_up must be 0 or more and fewer than the 600 steps, but is -1"),
    ({"warm_up": 10, "steps": 10}, "fewer than the 10 steps, but is 10"),
    ({"ema_decay": 1.0}, "ema_decay must be 0 .* below 1, but is 1.0"),
    ({"ema_decay": math.nan}, "ema_decay .* is nan"),
    ({"min_snr_gamma": 0.0}, "min_snr_gamma must be above 0"),
    ({"optimizer": "Lion"}, "optimizer must be AdamW or .* or AdamW8bit, but is 'Lion'"),
    ({"schedule": "poly"}, "constant or cosine or linear, but is 'poly'"),
    ({"timesteps": "cosmap"}, "automatic or uniform or logit-normal or shifted, but is 'cosmap'"),
    ({"loss_weight": "p2"}, "none or min-SNR or debiased, but is 'p2'"),
    ({"optimizer": "AdamWScheduleFree", "schedule": "cosine"}, "instead of using a schedule.*cosine and 0"),
    ({"optimizer": "AdamWScheduleFree", "ema_decay": 0.9}, "constant and 0.9"),
    ({"optimizer": "Prodigy"}, "Prodigy finds the learning rate itself.*0.0005; set it to 1"),
    ({"include_layers": "a("}, r"'a\(' is not a valid regular expression"),
    ({"exclude_layers": "ok\n[a"}, r"'\[a' is not a valid regular expression"),
    ({"layer_ranks": "attn"}, "pattern=rank"),
    ({"layer_ranks": "a(=3"}, r"'a\(' is not a valid regular expression"),
]


@pytest.mark.parametrize(("changes", "message"), MORE_BAD)
def test_settings_of_learning_out_of_range_are_refused_when_made(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_what_does_not_fit_the_model_is_refused_before_it_starts() -> None:
    seen: list[Progress] = []
    for changes, message in (
        ({"include_layers": "mlp"}, r"'mlp' \(include_layers\)"),
        ({"layer_ranks": "mlp=3"}, r"'mlp' \(layer_ranks\)"),
        ({"exclude_layers": "attn"}, "no layer to train"),
        ({"timesteps": "shifted"}, "need a flow model"),
    ):
        with pytest.raises(ValueError, match=message):
            train(toy(), replace(QUICK, **changes), seen.append)
    assert not seen


@pytest.mark.parametrize("stop_at", [1, 9, 17])
@pytest.mark.parametrize(
    ("changes", "package"),
    [
        ({"ema_decay": 0.9, "accumulate": 2, "batch_size": 2, "schedule": "cosine", "warm_up": 3}, "torch"),
        ({"optimizer": "Adafactor", "ema_decay": 0.9}, "torch"),
        ({"optimizer": "SGD", "learning_rate": 0.1}, "torch"),
        ({"optimizer": "Prodigy", "learning_rate": 1.0}, "prodigyopt"),
        ({"optimizer": "AdamWScheduleFree"}, "schedulefree"),
        ({"optimizer": "AdamW8bit"}, "bitsandbytes"),
    ],
)
def test_a_stopped_training_goes_on_bit_for_bit_whatever_it_learns_with(changes, package, stop_at, tmp_path) -> None:
    pytest.importorskip(package)
    config = replace(QUICK, steps=24, mode="product", restart_every=2, highest_threshold=0.9, held_out=0.2, **changes)
    seen: list[int] = []

    def stop() -> bool:
        return len(seen) == stop_at

    whole = train(toy(16), config)
    train(toy(16), config, lambda p: seen.append(p.done), stop, checkpoints=CheckpointConfig(tmp_path, every=100))
    resumed: list[int] = []
    again = train(
        toy(16), config, lambda p: resumed.append(p.resumed_at), checkpoints=CheckpointConfig(tmp_path, every=100)
    )
    assert set(resumed) == {stop_at}
    assert again.report.losses == whole.report.losses and again.report.validation == whole.report.validation
    for found, expected in zip(tensors(again), tensors(whole), strict=True):
        assert torch.equal(found, expected)


def test_a_first_pass_that_only_compiles_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, kernels are asked for in passes whose numbers mean nothing; here the passes alone are made."""
    alone = train(toy(objective=FLOW), QUICK)
    events: list[str] = []
    trial_step = warmup.trial_step

    @contextmanager
    def compiling(*_: object) -> Iterator[None]:
        events.append("begins")
        yield
        events.append("ends")

    def counting(*given: Any) -> None:
        events.append("pass")
        trial_step(*given)

    monkeypatch.setattr(warmup, "find_kernels", lambda *_: object())
    monkeypatch.setattr(warmup, "compile_in_parallel", compiling)
    monkeypatch.setattr(warmup, "trial_step", counting)
    monkeypatch.setattr(warmup, "_compiled_for", set())
    for expected in (["begins", "pass", "pass", "ends", "pass"], ["pass"]):  # the second time all is there
        events.clear()
        after = train(toy(objective=FLOW), QUICK)
        assert events == expected
        for one, same in zip(tensors(alone), tensors(after), strict=True):
            assert torch.equal(one, same)


def test_the_model_is_at_most_five_frames_below_the_loop() -> None:
    """The way through a step stays short enough to be read."""
    model, depths = toy(8), list[int]()
    denoise = model.denoise

    def measured(*given: Any) -> Tensor:
        frame, depth = inspect.currentframe(), 0
        while frame is not None and frame.f_code.co_name != "run_pass":
            frame, depth = frame.f_back, depth + 1
        if torch.is_grad_enabled():  # a step; others are measurements
            depths.append(depth - 1 if frame is not None else 0)  # this function is the model
        return denoise(*given)

    model.denoise = measured  # type: ignore[method-assign]
    train(model, replace(QUICK, steps=3))
    assert 1 <= max(depths) <= 5
