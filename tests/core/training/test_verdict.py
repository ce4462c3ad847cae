"""A training that taught nothing is told as that, whatever was measured: held-out images, its own, or its steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from aclora_core.adapter import RankReport, Setting, TrainingFacts
from aclora_core.config import TrainConfig
from aclora_core.training.summary import training_summary
from aclora_core.training.verdict import nothing_learned
from tests.support.toy import FLOW, HELD_OUT, toy, train

pytestmark = pytest.mark.usefixtures("one_thread")

HELD = replace(HELD_OUT, steps=24, learning_rate=0.02, batch_size=8, max_rank=4, mode="off")
RISEN = [0.9] + [4.0] * 9


def report(
    losses: Sequence[float] = (0.5,) * 10,
    validation: Sequence[tuple[int, float]] = (),
    fit: Sequence[tuple[int, float]] = (),
    **facts: Any,
) -> RankReport:
    settings: dict[str, Setting] = {"steps": len(losses)}
    return RankReport(settings, list(losses), list(validation), [], {}, {}, [], TrainingFacts(**facts), list(fit))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (report([math.nan] * 4), "none of its 4 steps counted"),
        (
            report(validation=[(0, 0.9), (10, 1.1)], best_step=10),
            "unseen (validation) images are predicted worse than without the LoRA",
        ),
        (report(validation=[(0, 0.9), (10, 0.9)], best_step=10), "unseen (validation) images are predicted worse"),
        (
            report(validation=[(0, 0.9), (10, math.nan)], best_step=10),
            "the loss of its validation images is not finite",
        ),
        (
            report(validation=[(0, 0.9), (5, 1.0), (10, 0.8)], best_step=10, chosen_step=5),
            "unseen (validation) images are predicted worse",
        ),
        (
            report(fit=[(0, 0.5), (10, 0.501)]),
            "its training images are predicted worse than without the LoRA, with 100.2 %",
        ),
        (report(fit=[(0, 0.5), (10, 0.501)], cancelled="training"), "its training images are predicted worse"),
        (report(fit=[(0, 0.5), (10, 0.501)], chosen_step=10), "its training images are predicted worse"),
        (report(fit=[(0, 0.5), (10, 0.495)]), "is still 99.0 % of the base model's"),
        (report(fit=[(0, 0.5), (10, math.inf)]), "the loss of its training images is not finite"),
        (report(RISEN, fit=[(0, 0.9)], cancelled="training"), "its loss has risen from 0.900 to 3.690"),
        (report(RISEN, validation=[(0, 0.9)], cancelled="training", best_step=10), "its loss has risen from 0.900"),
    ],
)
def test_every_kind_is_told_first_and_with_what_to_do(given: RankReport, sentence: str) -> None:
    problem = nothing_learned(given)
    assert problem.startswith("It learned nothing") and sentence in problem
    assert "learning_rate" in problem or "bf16 or fp32" in problem
    told = training_summary(given)
    assert problem in told and told.index(problem) <= len("Cancelled at step 10: the LoRA is what was learned so far. ")
    assert "Stopped by itself" not in told and "It ran to its last step" not in told


@pytest.mark.parametrize(
    "given",
    [
        report(),
        report([]),
        report(validation=[(0, 0.9), (10, 0.899)], best_step=10),
        report(validation=[(0, 0.9)], best_step=10),
        report(validation=[(5, 0.9), (10, 1.2)], best_step=10),  # the model's own loss is not known
        report(validation=[(0, 0.9), (5, 1.2), (10, 0.8)], best_step=10),
        report(fit=[(0, 0.5), (10, 0.2)]),
        report(fit=[(0, 0.5), (10, 0.495)], cancelled="training"),  # it may have learned more after it
        report(fit=[(0, 0.0), (10, 0.0)]),
        report([1.8] * 10, fit=[(0, 0.9)], cancelled="training"),
        report([math.nan] * 9 + [0.5]),
    ],
)
def test_what_has_learned_or_is_not_known_is_not_told_as_a_failure(given: RankReport) -> None:
    assert nothing_learned(given) == "" and "learned nothing" not in training_summary(given)


@pytest.mark.parametrize("count", [3, 7, 16])
@pytest.mark.parametrize("held_out", [0.0, 0.2])
@pytest.mark.parametrize("rate", [0.5, 50.0])
def test_a_learning_rate_that_ruins_the_model_is_told(count: int, held_out: float, rate: float, caplog: Any) -> None:
    config = replace(HELD, learning_rate=rate, held_out=held_out, weight_decay=0.0)
    found = train(toy(count, objective=FLOW), config).report
    told = training_summary(found)
    assert told.startswith("It learned nothing") and "worse than without the LoRA" in told
    assert "Lower learning_rate" in told and "as good as the whole" not in told
    assert nothing_learned(found) in caplog.text


def test_no_second_pass_repeats_what_made_the_model_worse() -> None:
    stages: list[str] = []
    config = replace(HELD, learning_rate=50.0)
    found = train(toy(16, objective=FLOW), config, lambda progress: stages.append(progress.stage)).report
    measured = dict(found.validation)
    assert measured[found.facts.best_step or 0] > measured[0]
    assert "training on all" not in stages and "cutting" not in stages and not found.truncations


def test_a_good_training_has_its_second_pass_and_no_such_sentence() -> None:
    stages: list[str] = []
    found = train(toy(16), HELD, lambda progress: stages.append(progress.stage)).report
    assert "training on all" in stages and nothing_learned(found) == ""


def test_a_learning_rate_that_does_nothing_is_told() -> None:
    config = TrainConfig(steps=20, learning_rate=1e-7, batch_size=8, max_rank=4, layers="attention and feed-forward")
    told = training_summary(train(toy(5), config).report)
    assert told.startswith("It learned nothing: the loss of its training images is still 100.0 % of the base model's")


@pytest.mark.parametrize("held_out", [0.0, 0.2])
def test_what_is_given_after_a_divergence_is_measured(held_out: float) -> None:
    """Its second step made it worse, and every loss from the fourth on is no number."""
    config = replace(HELD, steps=50, learning_rate=50.0, held_out=held_out)
    found = train(toy(16, objective=FLOW, spoil_step=lambda call: call > 3), config).report
    measured = found.validation if held_out else found.fit
    assert [step for step, _ in measured] == [0, 3]
    told = training_summary(found)
    assert told.startswith("It learned nothing") and "worse than without the LoRA" in told and "10 steps" in told
