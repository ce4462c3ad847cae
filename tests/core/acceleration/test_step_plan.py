"""Plans of a step: they fit, take the least time, and say how long that is."""

from dataclasses import replace

import pytest

from aclora_core.acceleration.step_plan import ActivationSizes, Copies, best_plan, given_plan

SIZES = ActivationSizes([100, 300, 200], 650, 600)


@pytest.mark.parametrize(
    ("rows", "free", "recomputed", "fitting", "peak_per_row"),
    [
        (2, 10_000, set(), 2, 650 + 600),
        (2, 2500, {1}, 2, 650 + 300),  # the largest first: it alone is enough
        (2, 1700, set(), 1, 650 + 600),  # one after the other is faster than recomputing two thirds
        (2, 1300, {1}, 1, 650 + 300),
        (5, 4650, set(), 3, 650 + 600),  # 3 and 2, as equal as possible
        (4, 1, {0, 1, 2}, 1, 650),  # as little as possible
    ],
)
def test_a_step_fits_in_the_least_time(
    rows: int, free: int, recomputed: set[int], fitting: int, peak_per_row: int
) -> None:
    plan = best_plan(SIZES, rows, free)
    assert (plan.peak, plan.rows, plan.recomputed) == (fitting * peak_per_row, fitting, recomputed)


@pytest.mark.parametrize(
    ("free", "recomputed", "selective"),
    [
        (1400, set(), set()),
        (1250, {1}, {1}),
        (900, {0, 1, 2}, {0, 1, 2}),
        (790, {0, 1, 2}, {0, 1}),  # all but the largest
        (760, {0, 1, 2}, {0}),
        (725, {0, 1, 2}, set()),
    ],
)
def test_costly_outputs_are_kept_as_far_as_they_fit(free: int, recomputed: set[int], selective: set[int]) -> None:
    sizes = replace(SIZES, costly=[20, 30, 50])
    plan = best_plan(sizes, 1, free)
    assert (plan.recomputed, plan.selective) == (recomputed, selective)
    assert plan.peak == 650 + sum(SIZES.blocks[index] for index in {0, 1, 2} - recomputed) + sum(
        sizes.costly[index] for index in selective
    )


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("free", range(500, 12_000, 700))
def test_a_step_that_can_fit_does(rows: int, free: int) -> None:
    plan = best_plan(SIZES, rows, free)
    assert plan.peak == SIZES.peak(plan.rows, plan.recomputed) and 1 <= plan.rows <= rows
    assert plan.fits == (0.9 * free >= SIZES.peak(1, {0, 1, 2})) == (plan.peak <= 0.9 * free)


def test_times_follow_the_measured_forward_passes() -> None:
    sizes = replace(SIZES, costly=[20, 30, 50], forward=[0.1, 0.2, 0.3])

    def seconds(rows: int, each: int, *recomputed: set[int]) -> float:
        return given_plan(sizes, rows, each, 10_000, *recomputed).seconds

    assert seconds(1, 1, set()) == pytest.approx(0.6 * 2.4)
    assert seconds(1, 1, {0, 1}) == pytest.approx(0.6 * 2.4 + 0.3)
    assert seconds(1, 1, {0, 1}, {1, 2}) == pytest.approx(0.6 * 2.4 + 0.1 + 0.6 * 0.2)
    assert seconds(4, 4, set()) == pytest.approx(0.6 * 2.4 * 4.45 / 1.45)
    assert seconds(4, 2, set()) == pytest.approx(2 * 0.6 * 2.4 * 2.45 / 1.45)


@pytest.mark.parametrize(
    ("copying", "seconds"),
    [(0.5, 2.04), (1.0, 1.0 + 1.44), (1.5, 3.0)],  # hidden, longer than the forward pass, and longer than both
)
def test_a_pass_takes_as_long_as_its_copies_at_least(copying: float, seconds: float) -> None:
    sizes = replace(SIZES, forward=[0.1, 0.2, 0.3])
    assert best_plan(sizes, 1, 10_000, {0, 1, 2}, Copies(copying)).seconds == pytest.approx(seconds)
    alone = best_plan(sizes, 1, 10_000, {0, 1, 2}, Copies(copying, beside=False))
    assert alone.seconds == pytest.approx(2.04 + 2 * copying)


def test_a_network_without_blocks_is_split_by_rows_alone() -> None:
    sizes = ActivationSizes([], 650, 600)
    assert best_plan(sizes, 4, 1600)[:4] == (True, 0.0, 1300, 2)
