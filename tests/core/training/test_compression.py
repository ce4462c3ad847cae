"""The smallest cut that is as good as the whole adapter."""

import math
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from aclora_core.adapter import Truncation, decompose
from aclora_core.adapter.adapter import Adapter, Layer
from aclora_core.config import TrainConfig
from aclora_core.training.compression import USED_RANKS, WHOLE, ranks_of, smallest_truncation
from aclora_core.training.progress import Result
from aclora_core.training.summary import training_summary
from tests.support.toy import HELD_OUT, WIDTH, Toy, planted, toy, train


def adapter(values: list[float], layers: int = 2) -> Adapter:
    """Layers (12, 10) with these singular values of the delta."""
    torch.manual_seed(0)
    found = {}
    for number in range(layers):
        u, v = torch.linalg.qr(torch.randn(12, len(values)))[0], torch.linalg.qr(torch.randn(10, len(values)))[0]
        found[f"layer{number}"] = Layer(v.T.contiguous(), u * torch.tensor(values) / 0.5, 0.5 * len(values))
    return Adapter(found)


def ranks(candidate: Adapter) -> set[int]:
    return {layer.rank for layer in candidate.layers.values()}


def by_rank(table: dict[int, float], noise: float = 0.0):
    """Losses that depend on the largest rank of a candidate, four of them, spread by the noise."""

    def losses_of(candidate: Adapter) -> Tensor:
        mean = table[max(ranks(candidate))]
        spread = noise * torch.tensor([-1.0, 1.0, -1.0, 1.0]) if max(ranks(candidate)) % 2 else torch.zeros(4)
        return (mean + spread).double()

    return losses_of


FALLING = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]


def test_the_smallest_cut_without_a_loss_is_chosen() -> None:
    table = dict.fromkeys(range(1, 9), 0.5) | {1: 0.9, 2: 0.7}
    cut, tried = smallest_truncation(adapter(FALLING), by_rank(table))
    assert cut == Truncation("fixed", 4)
    (chosen,) = [row for row in tried if row.chosen]
    assert chosen.name == "rank 4" and chosen.mean_rank == 4 and chosen.size == 2 * 2 * 4 * (12 + 10)
    assert [row.size for row in tried] == sorted(row.size for row in tried)
    assert {row.name for row in tried} >= {"whole", "rank 1", "rank 2", "rank 4", "energy 80%"}


def test_a_cut_can_be_better_than_the_whole() -> None:
    cut, tried = smallest_truncation(adapter(FALLING), by_rank(dict.fromkeys(range(1, 9), 0.6) | {2: 0.5}))
    assert cut.name == "rank 2"
    assert next(row for row in tried if row.name == "whole").loss == pytest.approx(0.6)


@pytest.mark.parametrize(("noise", "expected"), [(0.0, "rank 2"), (0.004, "rank 1")])
def test_a_difference_within_the_noise_counts_as_none(noise: float, expected: str) -> None:
    table = dict.fromkeys(range(1, 9), 0.5) | {1: 0.502}
    assert smallest_truncation(adapter(FALLING), by_rank(table, noise))[0].name == expected


def test_a_large_loss_is_never_taken_for_noise() -> None:
    """A standard error of 0.05 would let 0.53 pass; it is 6 % above 0.5."""
    table = dict.fromkeys(range(1, 9), 0.5) | {1: 0.53}
    assert smallest_truncation(adapter(FALLING), by_rank(table, 0.1))[0].name == "rank 2"


def test_a_cut_without_a_finite_loss_is_not_chosen() -> None:
    table = dict.fromkeys(range(1, 9), 0.5) | {1: math.nan, 2: math.inf}
    cut, tried = smallest_truncation(adapter(FALLING), by_rank(table))
    assert cut.name == "rank 4" and math.isinf(next(row.loss for row in tried if row.name == "rank 1"))


def test_cuts_that_are_the_same_are_tried_once() -> None:
    seen: list[tuple[int, ...]] = []

    def losses_of(candidate: Adapter) -> Tensor:
        seen.append(tuple(layer.rank for layer in candidate.layers.values()))
        return torch.ones(2)

    smallest_truncation(adapter([1.0, 1e-4, 1e-5]), losses_of)
    assert len(seen) == len(set(seen)) == 3  # rank 1 is every share of the energy too


def test_an_adapter_of_rank_one_stays_whole() -> None:
    cut, tried = smallest_truncation(adapter([1.0]), lambda candidate: torch.ones(3))
    assert cut is WHOLE and [row.name for row in tried] == ["whole"]


def test_a_stop_leaves_it_whole() -> None:
    answers = iter([False, False, True])
    assert smallest_truncation(adapter(FALLING), lambda candidate: torch.ones(3), lambda: next(answers)) == (WHOLE, [])


def test_a_training_gives_the_adapter_at_the_rank_of_the_truth() -> None:
    """The model is off by a matrix of rank 2, which 48 pictures show; the rest of rank 8 serves nothing."""
    config = replace(
        HELD_OUT,
        steps=400,
        learning_rate=0.05,
        batch_size=48,
        max_rank=8,
        mode="off",
        weight_decay=0.0,
        refit=False,
        stop_early=False,
    )
    model = toy(error=planted(2))
    result = train(model, config)
    layer = result.adapter.layers["toy.attn"]
    assert layer.rank == 2 and layer.scale == 1.0
    torch.testing.assert_close(layer.lora_up @ layer.lora_down, model.error, rtol=0, atol=0.02)
    chosen = next(cut for cut in result.report.truncations if cut.chosen)
    assert chosen.size == 2 * 2 * (16 + 16)
    whole = train(model, replace(config, smallest=False))
    assert whole.adapter.layers["toy.attn"].rank == 8 and not whole.report.truncations


PLAIN = TrainConfig(steps=60, learning_rate=0.02, batch_size=8, max_rank=8, mode="off", held_out=0.0, layers="all")
NAMES = ("toy.attn", "toy.idle")


def two_layered() -> Toy:
    """The toy off by a matrix of rank 4, with a second layer that no image goes through, so that it learns nothing."""
    model = toy(12, error=planted(4))
    model.network["idle"] = nn.Linear(WIDTH, WIDTH)
    return model


def delta(result: Result, name: str) -> Tensor:
    layer = result.adapter.layers[name]
    down, up = layer.factors()
    return layer.scale * up @ down


@pytest.mark.parametrize("held_out", [0.0, 0.3])
def test_without_held_out_images_every_layer_keeps_the_ranks_it_uses(held_out: float) -> None:
    """Three images of ten would be held out, but with seven different ones none is; then as without."""
    model = two_layered() if held_out == 0 else toy(7, error=planted(4))
    result, whole = (train(model, replace(PLAIN, held_out=held_out, smallest=smallest)) for smallest in (True, False))
    assert result.report.losses == whole.report.losses and not result.report.truncations
    for name, layer in whole.adapter.layers.items():
        assert layer.rank == 8
        values = torch.linalg.svdvals(delta(whole, name).double())
        energy = values.square().cumsum(0) / values.square().sum().clamp_min(1e-30)
        rank = result.adapter.layers[name].rank
        if name == "toy.idle":
            assert rank == 1 and not values.any()
            continue
        assert 1 < rank < 8 and energy[rank - 1] >= 0.98 > energy[rank - 2]
        left = (delta(whole, name) - delta(result, name)).square().sum() / delta(whole, name).square().sum()
        assert float(left) == pytest.approx(1 - float(energy[rank - 1]), rel=1e-2) and left <= 0.02


def test_a_training_says_to_how_many_ranks_it_was_truncated() -> None:
    result = train(two_layered(), PLAIN)
    ranks = [result.adapter.layers[name].rank for name in NAMES]
    size = 2 * sum(layer.lora_down.numel() + layer.lora_up.numel() for layer in result.adapter.layers.values())
    facts = result.report.facts
    assert (facts.rank_before, facts.rank_after, facts.truncated_size) == (8.0, sum(ranks) / 2, size)
    assert f"Truncated to rank {sum(ranks) / 2:.1f} of 8 on average, {size} B." in training_summary(result.report)
    whole = train(two_layered(), replace(PLAIN, smallest=False)).report
    assert whole.facts.rank_before is None and "Truncated" not in training_summary(whole)


def test_a_cancelled_training_is_truncated_too() -> None:
    seen: list[int] = []
    result = train(two_layered(), PLAIN, lambda progress: seen.append(progress.done), lambda: len(seen) == 20)
    whole = train(two_layered(), replace(PLAIN, steps=20, smallest=False)).adapter
    layers = decompose(whole)
    assert result.report.facts.cancelled == "training"
    found = {name: layer.rank for name, layer in result.adapter.layers.items()}
    assert found == ranks_of(USED_RANKS, layers) and found["toy.attn"] < 8


def test_a_truncation_that_fails_gives_the_whole_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Adapter:
        raise RuntimeError("CUDA error: out of memory")

    expected = train(two_layered(), replace(PLAIN, smallest=False))
    monkeypatch.setattr(sys.modules["aclora_core.training.train"], "truncated", fail)
    result = train(two_layered(), PLAIN)
    for name in NAMES:
        assert torch.equal(result.adapter.layers[name].lora_up, expected.adapter.layers[name].lora_up)
    told = "The LoRA could not be truncated to the ranks it uses (CUDA error: out of memory); it is returned whole."
    assert result.report.facts.notes == told and told in training_summary(result.report)
    assert result.report.facts.rank_before is None
