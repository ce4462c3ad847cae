"""Previews: drawn when due, with the adapter on the model, and never in the way of the training."""

from __future__ import annotations

import time

import pytest
import torch

from aclora_core.config.train_config import TrainConfig
from aclora_core.training.previews import Previews
from aclora_core.training.progress import Progress, Result
from aclora_core.training.trainer import Trainer
from tests.support.toy import Toy, toy, train

CONFIG = TrainConfig(steps=12, learning_rate=0.01, batch_size=4, max_rank=4, mode="off", held_out=0.0)


def ups(result: Result) -> torch.Tensor:
    return result.adapter.layers["toy.attn"].lora_up


def test_previews_come_every_so_many_steps_with_the_adapter_on() -> None:
    model, seen = toy(8), list[tuple[int, torch.Tensor]]()

    def draw(done: int) -> None:
        assert not torch.is_grad_enabled()
        seen.append((done, model.network["attn"](torch.eye(16)).clone()))

    previews = Previews(5, draw)
    result = train(model, CONFIG, previews=previews)
    assert [done for done, _ in seen] == [5, 10]
    plain = model.network["attn"](torch.eye(16))
    assert (seen[0][1] - plain).norm() > 0.01 and (seen[1][1] - plain).norm() > (seen[0][1] - plain).norm()
    assert torch.equal(ups(result), ups(train(toy(8), CONFIG)))
    assert result.report.facts.preview_seconds == pytest.approx(previews.seconds, abs=0.01)


def test_a_second_pass_has_previews_too() -> None:
    seen: list[int] = []
    config = TrainConfig(steps=8, batch_size=8, max_rank=4, mode="off", held_out=0.2, smallest=False)
    result = train(toy(16), config, previews=Previews(4, seen.append))
    best = result.report.facts.best_step
    assert best is not None and seen == [4, 8, *range(4, best + 1, 4)] and len(seen) > 2


@pytest.mark.parametrize(("share", "expected"), [(0.2, [1, 5, 9]), (1.0, list(range(1, 13)))])
def test_previews_take_no_more_than_their_share_of_the_time(monkeypatch, share: float, expected: list[int]) -> None:
    """Steps and sets take a second each, so with a fifth of the time a set has to wait for four steps."""
    seen, now = list[int](), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def a_second(done: int | Progress) -> None:
        now[0] += 1.0
        seen.extend([done] if isinstance(done, int) else [])

    result = train(toy(8), CONFIG, a_second, previews=Previews(1, a_second, share))
    assert seen == expected and result.report.facts.previews_left_out == 12 - len(expected)


def test_after_a_failure_training_goes_on_without_previews(caplog: pytest.LogCaptureFixture) -> None:
    tries: list[int] = []
    notes: list[str] = []

    def draw(done: int) -> None:
        tries.append(done)
        raise RuntimeError("out of memory\nmany lines of details")

    def note(progress: Progress) -> None:
        notes[:] = progress.notes

    result = train(toy(8), CONFIG, note, previews=Previews(3, draw))
    assert tries == [3] and torch.equal(ups(result), ups(train(toy(8), CONFIG)))
    assert notes == ["Step 3: no preview could be drawn (out of memory). Training goes on without previews."]
    assert notes[0] in caplog.text and notes[0] in result.report.facts.notes


@pytest.mark.parametrize("moves", [True, False])
def test_graphs_are_recorded_anew_only_where_weights_were_moved(monkeypatch, moves: bool) -> None:
    model, cleared = toy(8), list[int]()
    trainer = Trainer(model, model, CONFIG, range(8), Progress(12), 12)
    monkeypatch.setattr(trainer.adapted.graphs, "clear", lambda: cleared.append(1))
    with trainer.lent():
        move(model, moves)
    assert len(cleared) == moves


def move(model: Toy, moves: bool) -> None:
    weight = model.network["attn"].weight
    if moves:
        weight.data = weight.data.clone()
    else:
        weight.data.mul_(1.0)
