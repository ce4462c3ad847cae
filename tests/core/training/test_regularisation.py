"""Regularisation pictures: learned from with their weight, and never taken for the style."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aclora_core.config.checkpoints import CheckpointConfig
from aclora_core.config.train_config import TrainConfig
from aclora_core.training.batches import BatchStream
from aclora_core.training.held_out import hold_out
from aclora_core.training.sampler import style_indices
from aclora_core.training.summary import training_summary
from tests.support.toy import FLOW, WIDTH, Toy, toy, train

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = TrainConfig(
    steps=8, learning_rate=0.02, batch_size=4, max_rank=4, mode="off", weight_decay=0.0, held_out=0.0, smallest=False
)


def silent_style(weight: float, style: int = 4, others: int = 4) -> Toy:
    """The model is right about the pictures of the style; only those for regularisation teach it something."""
    error = torch.zeros(WIDTH, WIDTH)
    error[:, 0] = 1.0
    model = toy(style + others, error=error, regularisation=dict.fromkeys(range(style, style + others), weight))
    for number, latent in enumerate(model.latents):
        latent[:, 0] = 1.0 if number >= style else 0.0
    return model


def test_they_count_by_their_weight_in_what_is_learned_and_not_in_the_loss_that_is_told() -> None:
    model = toy(12, objective=FLOW, regularisation={number: 0.25 for number in range(3, 12)})
    drawing = BatchStream(
        model, model, replace(QUICK, batch_size=2, accumulate=2), range(12), torch.Generator().manual_seed(0)
    )
    kinds = set()
    for _ in range(30):
        step = drawing.next_step()
        numbers = torch.cat([batch.conditioning["pictures"] for batch in step.batches]).tolist()
        told = torch.cat([batch.weight for batch in step.batches])
        learned = torch.cat([batch.train_weight for batch in step.batches])
        style = style_indices(model, numbers)
        assert step.reports_style == bool(style) and float(told.sum()) == pytest.approx(1)
        telling = style or numbers
        assert told.tolist() == pytest.approx([1 / len(telling) if n in telling else 0.0 for n in numbers])
        assert learned.tolist() == pytest.approx([(1.0 if n < 3 else 0.25) / 4 for n in numbers])
        kinds.add(len(style))
    assert 0 in kinds and len(kinds) > 2  # steps with none of the style were among them


def test_without_them_a_batch_is_as_it_always_was() -> None:
    step = BatchStream(toy(8), toy(8), QUICK, range(8), torch.Generator().manual_seed(0)).next_step()
    assert step.batches[0].train_weight is None and step.batches[0].weight.tolist() == [0.25] * 4 and step.reports_style


def test_they_teach_and_their_loss_is_not_told() -> None:
    result = train(silent_style(1.0), replace(QUICK, batch_size=8))
    assert result.report.losses[0] == 0.0 and result.adapter.layers["toy.attn"].lora_up.any()


def test_twice_the_weight_pulls_twice_as_far() -> None:
    config = replace(QUICK, steps=1, batch_size=8, optimizer="SGD", max_norm=1e9)
    once, twice = (train(silent_style(weight), config).adapter.layers["toy.attn"].lora_up for weight in (0.5, 1.0))
    assert once.any()
    torch.testing.assert_close(twice, 2 * once)


def test_they_are_neither_held_out_nor_counted() -> None:
    model = toy(40, regularisation=dict.fromkeys(range(10, 40), 1.0))
    for seed in range(6):
        learned, held = hold_out(model, range(40), 0.3, seed)
        assert len(held) == 3 and max(held) < 10 and sorted(learned + held) == list(range(40))
    assert hold_out(replace(model, regularisation=dict.fromkeys(range(7, 40), 1.0)), range(40), 0.3, 0)[1] == []


def test_the_report_counts_them_apart_and_an_epoch_shows_each_once() -> None:
    model = toy(14, regularisation={12: 0.5, 13: 0.5})
    report = train(model, replace(QUICK, steps=8, batch_size=7)).report
    assert report.facts.images == 12 and report.facts.regularisation_images == 2
    assert report.facts.epochs == 4
    assert "on 12 images and 2 regularisation images." in training_summary(report)
    assert [sorted(a + b) for a, b in zip(model.learned[1::2], model.learned[2::2], strict=True)] == [
        list(range(14))
    ] * 4
    assert train(toy(12), QUICK).report.facts.regularisation_images is None


def test_the_threshold_follows_the_loss_of_the_style_alone() -> None:
    """One picture in a step, so most steps have none of the style; their losses are far larger."""
    model = silent_style(1.0, style=2, others=6)
    config = replace(QUICK, steps=16, batch_size=1, mode="paper", threshold="dynamic", restart_every=1)
    restarts = train(model, config).report.restarts
    assert restarts and all(restart.loss == pytest.approx(0, abs=0.05) for restart in restarts[:1])


def test_the_second_pass_learns_from_them_too() -> None:
    model = toy(20, objective=FLOW, regularisation={18: 1.0, 19: 1.0})
    report = train(model, replace(QUICK, steps=40, held_out=0.2, refit=True, smallest=False)).report
    steps = len(report.losses)
    second = [number for call in model.calls[-steps:] for number in call]
    assert report.facts.held_out_images == 4 and report.facts.images == 18
    assert steps >= 5 and set(second) == set(range(20))


def test_a_training_with_them_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="no images to learn from"):
        train(toy(3, regularisation=dict.fromkeys(range(3), 1.0)), QUICK)


def test_a_resumed_training_is_the_same_and_another_weight_is_noticed(tmp_path: Path) -> None:
    config = replace(QUICK, steps=12, batch_size=2, mode="paper", threshold="dynamic", restart_every=1)

    def model(weight: float = 0.5) -> Toy:
        masks = {1: torch.ones(1, 1, 1, 1), 5: torch.full((1, 1, 1, 1), 0.5)}
        return toy(8, objective=FLOW, regularisation={6: weight, 7: weight}, masks=masks)

    seen: list[int] = []
    checkpoints = CheckpointConfig(tmp_path / "c", every=1)
    train(model(), config, lambda p: seen.append(p.done), lambda: seen[-1:] == [7], checkpoints=checkpoints)
    with pytest.raises(ValueError, match=r"another training: regularisation_weight was \[0.5\] and is \[0.51\]. Set"):
        train(model(0.51), config, checkpoints=checkpoints)
    resumed, whole = train(model(), config, checkpoints=checkpoints), train(model(), config)
    assert resumed.report.losses == whole.report.losses and resumed.report.restarts == whole.report.restarts
    layers = [result.adapter.layers["toy.attn"].lora_up for result in (resumed, whole)]
    assert torch.equal(*layers)
