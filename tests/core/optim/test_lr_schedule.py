"""The learning rate of every step, by hand."""

import math

import pytest

from aclora_core.optim.lr_schedule import learning_rate_at


def rates(schedule, warm_up: int = 0, steps: int = 10, peak: float = 2.0) -> list[float]:
    return [learning_rate_at(step, steps, peak, schedule, warm_up) for step in range(steps)]


def test_constant_is_the_rate_itself_bit_for_bit() -> None:
    assert rates("constant", peak=5e-4) == [5e-4] * 10


def test_linear_goes_down_in_equal_steps_and_never_to_zero() -> None:
    assert rates("linear") == pytest.approx([2, 1.8, 1.6, 1.4, 1.2, 1, 0.8, 0.6, 0.4, 0.2])


def test_cosine_is_half_a_wave() -> None:
    found = rates("cosine")
    assert found == pytest.approx([1 + math.cos(math.pi * step / 10) for step in range(10)])
    assert found[0] == 2 and found[5] == pytest.approx(1) and found[9] > 0


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_climbs_in_equal_steps_to_the_peak_and_the_rest_follows(schedule) -> None:
    found = rates(schedule, warm_up=4)
    assert found[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert found[4:] == pytest.approx(rates(schedule, steps=6))


def test_steps_beyond_the_plan_have_the_last_rate_or_none() -> None:
    assert learning_rate_at(15, 10, 1.0, "linear", 0) == 0 and learning_rate_at(15, 10, 1.0, "constant", 0) == 1
