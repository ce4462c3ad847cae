"""A training whose pictures come in several sizes: epochs, held-out pictures, and a resume."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aclora_core.config.checkpoints import CheckpointConfig
from aclora_core.training.held_out import hold_out
from tests.support.toy import FLOW, HELD_OUT, Toy, toy, train

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = replace(
    HELD_OUT,
    steps=30,
    learning_rate=0.02,
    batch_size=4,
    max_rank=4,
    restart_every=2,
    threshold="dynamic",
    stop_early=False,
    refit=False,
    smallest=False,
)


def sized_toy(pictures: int = 10) -> Toy:
    """Each picture in two sizes, 1 × 1 and 2 × 2 places, of as many numbers; every third in the first only."""
    model = toy(2 * pictures, objective=FLOW)
    model.latents = [x if number % 2 == 0 else x.reshape(1, 4, 2, 2) for number, x in enumerate(model.latents)]
    model.batch_keys = [tuple(latent.shape) for latent in model.latents]
    model.variants = {2 * n: [2 * n] if n % 3 == 0 else [2 * n, 2 * n + 1] for n in range(pictures)}
    return model


def test_every_picture_comes_once_in_an_epoch_in_one_of_its_sizes_and_alike_ones_together() -> None:
    model = sized_toy()
    report = train(model, replace(CONFIG, held_out=0.0)).report
    parts = model.learned[1:]
    assert len(report.losses) == 30 and report.facts.images == 10 and report.facts.epochs == 10
    assert len(parts) > 30  # a step of both sizes goes through the model in parts
    assert all(len({model.batch_keys[number] for number in part}) == 1 for part in parts)
    shown: list[int] = []
    for part in parts:
        shown += [number // 2 for number in part]
        if len(shown) == 10:
            assert sorted(shown) == list(range(10))
            shown.clear()
        assert len(shown) < 10
    sizes = Counter(model.batch_keys[number] for part in parts for number in part)
    assert min(sizes.values()) > 15
    assert report.restarts and report.restarts[-1].epoch <= report.facts.epochs + 2


def test_held_out_pictures_are_measured_in_the_main_size_and_learned_from_in_none() -> None:
    model = sized_toy()
    _, held = hold_out(model, list(model.variants), CONFIG.held_out, CONFIG.seed)
    train(model, CONFIG)
    assert len(held) == 2 and all(number % 2 == 0 for number in held)
    aside = {number for picture in held for number in model.variants[picture]}
    seen = [set(call) for call in model.calls[1:]]
    assert all(call.isdisjoint(aside) or call <= set(held) for call in seen)
    assert any(call <= set(held) for call in seen)


@pytest.mark.parametrize("stop", [1, 8, 17])
def test_a_resumed_training_shows_the_same_sizes(tmp_path: Path, stop: int) -> None:
    checkpoints, seen = CheckpointConfig(tmp_path / "c", every=1000), list[int]()
    train(sized_toy(), CONFIG, lambda p: seen.append(p.done), lambda: seen[-1:] == [stop], checkpoints=checkpoints)
    resumed, whole = train(sized_toy(), CONFIG, checkpoints=checkpoints), train(sized_toy(), CONFIG)
    assert resumed.report.losses == whole.report.losses and resumed.report.validation == whole.report.validation
    ups = [result.adapter.layers["toy.attn"].lora_up for result in (resumed, whole)]
    assert torch.equal(*ups)
