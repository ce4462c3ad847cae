"""The summary that the user reads when a training has ended."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from aclora_core.adapter.rank_report import RankReport, Restart
from aclora_core.adapter.training_facts import Setting, TrainingFacts
from aclora_core.adapter.truncation_loss import Truncation, TruncationLoss
from aclora_core.config.checkpoints import CheckpointConfig
from aclora_core.config.train_config import TrainConfig
from aclora_core.method.restart import LayerRank
from aclora_core.training.progress import Progress, Result
from aclora_core.training.summary import training_summary
from tests.support.toy import HELD_OUT, toy, train

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = replace(HELD_OUT, steps=12, learning_rate=0.01, batch_size=8, max_rank=4, mode="off")


def stopped_in(stage: str, config: TrainConfig = CONFIG, **more: CheckpointConfig) -> Result:
    """Return the result of a training that is cancelled as early as possible in this stage."""
    seen: list[str] = []

    def note(progress: Progress) -> None:
        seen.append(progress.stage)

    return train(toy(16), config, note, lambda: seen[-1:] == [stage], **more)


@pytest.mark.parametrize(
    ("stage", "start"),
    [
        ("training", "Cancelled at step 1: the LoRA is what was learned so far. 1 step on 16 images."),
        (
            "cutting",
            "Cancelled during the search for the smallest size: the LoRA is not truncated. 12 steps on 16 images.",
        ),
        (
            "training on all",
            "Cancelled during the second pass, on all images: the LoRA is that of the first pass. 13",
        ),
    ],
)
def test_a_cancelled_training_says_so_first(stage: str, start: str) -> None:
    assert training_summary(stopped_in(stage).report).startswith(start)


def test_a_resumed_training_does_not_mention_the_cancel(tmp_path) -> None:
    config = replace(CONFIG, refit=False, smallest=False)
    checkpoints = CheckpointConfig(tmp_path / "ink")
    stopped_in("training", config, checkpoints=checkpoints)
    whole = train(toy(16), config, checkpoints=checkpoints)
    assert training_summary(whole.report).startswith("12 steps on 16 images. Best at step 12: loss ")


def test_both_passes_are_counted() -> None:
    summary = training_summary(train(toy(16), CONFIG).report)
    passes = "12 to find the best step, 12 on all images"
    assert summary.startswith(f"24 steps on 16 images: {passes}. Best at step 12: loss ")
    assert " on 3 validation images." in summary
    assert "restart" not in summary and "signal" not in summary  # there were none


def test_every_fact_has_its_sentence() -> None:
    facts = TrainingFacts(
        steps_run=9,
        images=12,
        regularisation_images=3,
        preview_seconds=30.4,
        seconds_run=100.2,
        previews_left_out=2,
        notes="The disk was full.",
    )
    losses, ranks = [0.5] * 8 + [float("nan")], {"a": LayerRank(1, 1, 1, 0.9, 0.1)}
    cuts = [
        TruncationLoss(Truncation.from_name("rank 2"), 2.0, 340_000, 0.5, 0.01, True),
        TruncationLoss(Truncation.from_name("whole"), 16.0, 2_000_000, 0.5, 0.0, False),
    ]
    report = RankReport({}, losses, [], [Restart(4, 2, 0.5, 0.9, ranks)], {}, {"a": 1, "b": 4}, cuts, facts)
    assert training_summary(report) == (
        "9 steps on 12 images and 3 regularisation images. Truncated to rank 2, 340 kB, as good as the full LoRA. "
        "1 restart; signal rank 2.5 (1 to 4) over 2 layers. Steps skipped because their loss was not finite: 1. "
        "Previews took 30 of 100 seconds; 2 sets skipped to stay within preview_share. The disk was full."
    )


def fitted(last: float, steps: int = 560, planned: int = 1000, **facts: Any) -> str:
    """Return the sentences on a training whose images have this loss at its last measurement, and had 0.5 before."""
    settings: dict[str, Setting] = {"steps": planned}
    fit = [(0, 0.5), (80, 0.4), (560, last)]
    return training_summary(RankReport(settings, [0.3] * steps, [], [], {}, {}, [], TrainingFacts(**facts), fit))


@pytest.mark.parametrize(
    ("last", "steps", "facts", "sentence"),
    [
        (0.09, 560, {}, "Stopped by itself: the loss of its training images fell to 18 % of the base model's."),
        (0.17, 1000, {}, "It ran to its last step: the loss of its training images fell to 34 % of the base model's."),
        (0.08, 1000, {}, "It ran to its last step: the loss of its training images fell to 16 % of the base model's."),
        (
            0.17,
            563,
            {"cancelled": "training"},
            "At step 560 the loss of its training images was 34 % of the base model's.",
        ),
        (
            0.09,
            560,
            {"cancelled": "training"},
            "At step 560 the loss of its training images was 18 % of the base model's.",
        ),
        (0.17, 563, {"chosen_step": 563}, "At step 560 the loss of its training images was 34 % of the base model's."),
        (
            0.496,
            563,
            {"cancelled": "training"},
            "At step 560 the loss of its training images was 99 % of the base model's.",
        ),
        (
            0.493,
            1000,
            {},
            "It learned nothing: the loss of its training images is still 98.6 % of the base model's. Lower "
            "learning_rate if the loss jumps up and down; raise learning_rate or steps if it hardly moves.",
        ),
        (
            0.501,
            1000,
            {},
            "It learned nothing: its training images are predicted worse than without the LoRA, with 100.2 % of the "
            "base model's loss. Lower learning_rate to a third or less and train again.",
        ),
    ],
)
def test_it_says_how_well_the_adapter_fits_its_images(
    last: float, steps: int, facts: dict[str, Any], sentence: str
) -> None:
    told = fitted(last, steps, **facts)
    assert sentence in told and told.count("training images") == 1


def test_a_loss_that_is_no_number_is_told_as_a_failure() -> None:
    told = fitted(float("nan"))
    assert told.startswith(
        "It learned nothing that can be used: with the LoRA the loss of its training images is not finite"
    )
    assert told.count("training images") == 1 and "training images" not in training_summary(empty_report())


def empty_report() -> RankReport:
    return RankReport({}, [], [], [], {}, {})


def test_a_learning_rate_that_is_far_too_high_is_told() -> None:
    config = replace(CONFIG, steps=40, learning_rate=50.0, held_out=0.0)
    told = training_summary(train(toy(16), config).report)
    assert (
        "It learned nothing: its training images are predicted worse than without the LoRA" in told
        and "Lower learning_rate" in told
    )


def test_a_truncation_to_the_used_ranks_is_told() -> None:
    facts = TrainingFacts(rank_before=30.5, rank_after=5.27, truncated_size=1_840_000)
    told = training_summary(replace(empty_report(), facts=facts))
    assert "Truncated to rank 5.3 of 30.5 on average, 1.84 MB." in told


def test_a_chosen_step_is_named_instead_of_the_training() -> None:
    report = train(toy(16), replace(CONFIG, held_out=0.2)).report
    chosen = replace(report, facts=replace(report.facts, chosen_step=7), truncations=[])
    assert training_summary(chosen) == "The LoRA is that of step 7, as chosen."
    assert "Best at step" in training_summary(report) and "Best at step" not in training_summary(chosen)


@pytest.mark.parametrize(
    ("style", "copies", "more"),
    [
        (0.74, 0.0, ""),
        (0.74, 0.25, " It is starting to copy its training images: stop earlier or add images."),
        (-0.1, None, " Its images are no closer to the style than without it: lower learning_rate."),
    ],
)
def test_what_unseen_prompts_gain_is_said(style: float, copies: float | None, more: str) -> None:
    facts = TrainingFacts(
        images=4, steps_run=1, unseen_prompts=3, style_gained=style, content_kept=0.871, copied_share=copies
    )
    said = f"On 3 unseen prompts: style 0.00 → {style:.2f}, content kept 0.87.{more}"
    assert training_summary(RankReport({}, [0.5], [], [], {}, {"a": 1}, [], facts)).endswith(said)
