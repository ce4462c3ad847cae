"""aclora_core.evaluation: standard errors of measures, against formulas and against simulated repetitions."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from aclora_core.evaluation import cmmd, estimate, spread
from aclora_core.evaluation.estimate import GROUPS, Estimate, difference

pytestmark = pytest.mark.usefixtures("one_thread")


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean(rows: Tensor) -> float:
    return rows.mean().item()


@pytest.mark.parametrize("count", [3, 10, GROUPS])
def test_the_error_of_a_mean_is_the_deviation_over_the_root_of_the_count(count: int) -> None:
    rows = sample(count)
    found = estimate(mean, rows)
    assert found.value == rows.mean().item()
    assert found.error == pytest.approx(rows.std().item() / math.sqrt(count))


def test_groups_of_many_images_give_about_the_same_error() -> None:
    rows = sample(5 * GROUPS)
    assert estimate(mean, rows).error == pytest.approx(rows.std().item() / math.sqrt(len(rows)), rel=0.4)


def test_variances_of_independent_sets_add_up() -> None:
    a, b = sample(12), 3 * sample(20, seed=1)
    found = estimate(lambda x, y: mean(x) - mean(y), a, b)
    assert found.error == pytest.approx(math.hypot(estimate(mean, a).error or 0, estimate(mean, b).error or 0))


def test_a_difference_of_independent_estimates_has_both_errors() -> None:
    assert difference(Estimate(5.0, 3.0), Estimate(1.0, 4.0)) == Estimate(4.0, 5.0)
    assert difference(Estimate(5.0), Estimate(1.0, 4.0)) == Estimate(4.0, None)


@pytest.mark.parametrize(
    "measure", [spread, lambda rows: cmmd(rows, 1.5 + sample(12, 6, seed=99))], ids=["spread", "cmmd"]
)
def test_the_error_is_what_repetitions_with_other_images_show(measure: Callable[[Tensor], float]) -> None:
    found = [estimate(measure, 1 + sample(12, 6, seed=seed)) for seed in range(60)]
    true = torch.tensor([each.value for each in found]).std().item()
    mean_error = torch.tensor([each.error for each in found]).square().mean().sqrt().item()
    assert 0.7 * true < mean_error < 1.6 * true


def test_two_images_are_too_few_for_an_error() -> None:
    assert estimate(mean, sample(2)).error is None
    assert estimate(lambda x, y: mean(x) - mean(y), sample(10), sample(1)).error is None
