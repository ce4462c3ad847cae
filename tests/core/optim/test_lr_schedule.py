"""The learning rate of every step, against values by hand."""

import math

import pytest

from aclora_core.optim.lr_schedule import learning_rate_at


def rates(schedule, warmup_steps: int = 0, steps: int = 10, peak: float = 2.0) -> list[float]:
    return [learning_rate_at(step, steps, peak, schedule, warmup_steps) for step in range(steps)]


def test_constant_is_exactly_the_peak() -> None:
    assert rates("constant", peak=5e-4) == [5e-4] * 10


def test_linear_decays_in_equal_steps_and_never_to_zero() -> None:
    assert rates("linear") == pytest.approx([2, 1.8, 1.6, 1.4, 1.2, 1, 0.8, 0.6, 0.4, 0.2])


def test_cosine_is_half_a_period() -> None:
    found = rates("cosine")
    assert found == pytest.approx([1 + math.cos(math.pi * step / 10) for step in range(10)])
    assert found[0] == 2 and found[5] == pytest.approx(1) and found[9] > 0


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warmup_rises_in_equal_steps_to_the_peak_before_the_decay(schedule) -> None:
    found = rates(schedule, warmup_steps=4)
    assert found[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert found[4:] == pytest.approx(rates(schedule, steps=6))


def test_steps_beyond_the_planned_length_are_clamped_to_its_end() -> None:
    assert learning_rate_at(15, 10, 1.0, "linear", 0) == 0 and learning_rate_at(15, 10, 1.0, "constant", 0) == 1
