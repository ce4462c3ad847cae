"""What the user reads of a training when it has ended."""

from __future__ import annotations

from dataclasses import replace

import pytest

from aclora_core.adapter.rank_report import RankReport, Restart
from aclora_core.adapter.training_facts import TrainingFacts
from aclora_core.adapter.truncation_loss import Truncation, TruncationLoss
from aclora_core.config.checkpoints import CheckpointConfig
from aclora_core.config.train_config import TrainConfig
from aclora_core.method.restart import LayerRank
from aclora_core.training.progress import Progress, Result
from aclora_core.training.summary import training_summary
from tests.support.toy import toy, train

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = TrainConfig(steps=12, learning_rate=0.01, batch_size=8, max_rank=4, mode="off")


def stopped_in(stage: str, config: TrainConfig = CONFIG, **more: CheckpointConfig) -> Result:
    """A training that somebody cancels at its first chance in this stage."""
    seen: list[str] = []

    def note(progress: Progress) -> None:
        seen.append(progress.stage)

    return train(toy(16), config, note, lambda: seen[-1:] == [stage], **more)


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("training", "Cancelled at step 1: this is what was learned so far. 1 step over 16 pictures."),
        ("cutting", "Cancelled while the smallest size was looked for: this is the whole. 12 steps over 16 pictures."),
        ("training on all", "Cancelled while training once more with all pictures: this is the result from before. 13"),
    ],
)
def test_a_cancelled_training_says_so_first(stage: str, said: str) -> None:
    assert training_summary(stopped_in(stage).report).startswith(said)


def test_one_that_went_on_afterwards_says_nothing_of_it(tmp_path) -> None:
    config = replace(CONFIG, refit=False, smallest=False)
    checkpoints = CheckpointConfig(tmp_path / "ink")
    stopped_in("training", config, checkpoints=checkpoints)
    whole = train(toy(16), config, checkpoints=checkpoints)
    assert training_summary(whole.report).startswith("12 steps over 16 pictures. Best at step 12: loss ")


def test_both_passes_are_counted() -> None:
    told = training_summary(train(toy(16), CONFIG).report)
    assert told.startswith("24 steps over 16 pictures: 12 to find the best, 12 with all. Best at step 12: loss ")
    assert " on the 3 pictures set aside." in told and told.endswith("1 layer, signal rank 1.0 (1 to 1), 0 restarts.")


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
        "9 steps over 12 pictures and 3 regularisation pictures. Cut to rank 2, 0.3 MB, as good as the whole. "
        "2 layers, signal rank 2.5 (1 to 4), 1 restart. Steps left out, as their loss was not finite: 1. "
        "Previews took 30 of 100 seconds; 2 sets were left out, to take no more of the time. The disk was full."
    )
