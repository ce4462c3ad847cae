import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aclora_core.method.noise_floor import count_above_noise
from aclora_core.method.rank_rules import rank_by_noise_floor
from tests.support.reference import hard_threshold_factor, noise_floor, noise_spectrum, white_noise_floor


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planted(rows: int, cols: int, strengths: list[float], noise: torch.Tensor, seed: int) -> torch.Tensor:
    """The noise with components of these strengths in it, in random directions."""
    left, right = (torch.linalg.qr(torch.randn(s, len(strengths), generator=seeded(seed + s))).Q for s in (rows, cols))
    return left * torch.tensor(strengths) @ right.mT + noise


def rank(values: list[float]) -> int:
    return rank_by_noise_floor(torch.tensor(values), len(values), len(values))


def test_hard_threshold_has_the_published_values() -> None:
    assert hard_threshold_factor(100, 100) == pytest.approx(4 / math.sqrt(3), rel=1e-12)
    assert hard_threshold_factor(50, 100) == pytest.approx(1.9786, abs=5e-5)


@pytest.mark.parametrize("rows, cols", [(300, 300), (150, 300), (30, 600)])
def test_without_a_level_the_floor_of_white_noise_is_that_of_gavish_and_donoho(rows: int, cols: int) -> None:
    spectra = torch.linalg.svdvals(0.2 * torch.randn(8, rows, cols, generator=seeded()))
    floors = [noise_floor(values.double().numpy(), rows, cols) for values in spectra]
    assert np.mean(floors) == pytest.approx(white_noise_floor(rows, cols, 0.2), rel=0.03)


@given(st.integers(3, 40), st.integers(0, 99), st.integers(0, 999), st.floats(0.0, 1.0))
def test_at_the_floor_the_d_transform_of_the_noise_has_the_slope_that_screenot_asks_for(
    count: int, more: int, seed: int, fall: float
) -> None:
    falling = torch.exp(-fall * torch.arange(count))[:, None]
    values = torch.linalg.svdvals(falling * torch.randn(count, count + more, generator=seeded(seed)).double())
    numbers = values.numpy()
    floor = noise_floor(numbers, count, count + more)

    def psi(most: int) -> float:
        """d log D / d log y by a difference, from the definition."""
        noise = noise_spectrum(numbers, most)

        def log_d(log_y: float) -> float:
            y = math.exp(log_y)
            phi = float((y / (y * y - noise**2)).mean())
            aspect = count / (count + more)
            return math.log(phi) + math.log(aspect * phi + (1 - aspect) / y)

        at = math.log(floor)
        if floor * math.exp(-1e-6) <= noise[0]:
            return -math.inf
        return (log_d(at + 1e-6) - log_d(at - 1e-6)) / 2e-6

    few, many = max(1, count // 4), (count - 1) // 2
    expected = many if abs(psi(many) + 4) < abs(psi(few) + 4) else few
    assert psi(expected) == pytest.approx(-4.0, abs=0.02)


def test_floor_in_correlated_noise_costs_less_than_the_rule_for_white_noise() -> None:
    """ScreeNOT promises the least squared error of all hard thresholds; to assume a quarter signal costs some of it."""
    size, strengths = 160, [6.0, 4.0, 3.0, 2.0, 1.6, 1.2]
    lost, best, white = 0.0, 0.0, 0.0
    for seed in range(6):
        colour = torch.logspace(0.0, -1.0, size)[:, None]
        noise = colour * torch.randn(size, size, generator=seeded(seed)) / math.sqrt(size)
        signal = planted(size, size, strengths, torch.zeros(size, size), seed)
        u, d, vh = torch.linalg.svd(signal + noise)
        errors = [float(((u[:, :k] * d[:k]) @ vh[:k] - signal).square().sum()) for k in range(40)]
        lost += errors[rank_by_noise_floor(d, size, size)]
        best += min(errors)
        white += errors[int((d > 2.858 * d.median()).sum())]  # Gavish and Donoho, the level unknown
    assert best <= lost < 1.3 * best < 1.6 * best < white


@pytest.mark.parametrize("rows, cols", [(60, 60), (30, 240)])
def test_noise_floor_finds_a_planted_rank(rows: int, cols: int) -> None:
    for seed in range(10):
        noise = 0.1 * torch.randn(rows, cols, generator=seeded(seed))
        values = torch.linalg.svdvals(planted(rows, cols, [0.4 * math.sqrt(cols)] * 3, noise, seed))
        assert rank_by_noise_floor(values, rows, cols) == 3
        assert int((values > white_noise_floor(rows, cols, 0.1)).sum()) == 3


@pytest.mark.parametrize("signal", [1, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("kind", ["late", "early"])
def test_floor_of_a_delta_finds_up_to_half_of_its_components(signal: int, kind: str) -> None:
    """The noise of a delta late in a training is the top of a white bulk; early it has passed a random lora_down."""
    for seed in range(8):
        if kind == "late":
            noise = torch.linalg.svdvals(torch.randn(64, 64, generator=seeded(seed)))[: 16 - signal]
        else:
            down = torch.rand(16 - signal, 64, generator=seeded(seed)) - 0.5
            learned = torch.randn(64, 64, generator=seeded(seed + 99)) @ down.mT
            noise = torch.linalg.svdvals(learned @ down)[: 16 - signal]
        values = torch.cat((torch.linspace(12.0, 6.0, signal) * noise[0], noise))
        assert rank_by_noise_floor(values, 16, 16) == signal


def test_white_noise_alone_keeps_the_one_component_that_is_always_kept() -> None:
    spectra = torch.linalg.svdvals(torch.randn(40, 24, 64, generator=seeded()))
    assert sum(rank_by_noise_floor(values, 24, 64) > 1 for values in spectra) <= 2


def test_floor_lies_between_the_noise_and_what_flat_noise_asks_for() -> None:
    assert noise_floor(np.array([90.0, 1.0, 1.0, 1.0, 1.0]), 5, 5) == pytest.approx(math.sqrt(3), rel=1e-6)
    assert rank([3.0, 1.0, 1.0, 1.0, 1.0, 1.0]) == 1
    assert rank([3.0, 2.0, 1.0, 1.0, 1.0, 1.0]) == 2
    assert rank([3.0, 2.5, 2.0, 1e-7, 1e-7, 1e-8, 1e-8, 0.0]) == 3
    assert rank([3.0, 2.5, 0.0, 0.0, 0.0, 0.0]) == 2


def test_spectra_too_short_to_tell_noise_are_signal() -> None:
    assert [rank([2.0]), rank([2.0, 1e-3]), rank([2.0, 0.0]), rank([0.0, 0.0])] == [1, 2, 1, 1]


@pytest.mark.parametrize("size", [1e-150, 1e-20, 1e20, 1e150])
def test_the_count_does_not_depend_on_the_magnitude(size: float) -> None:
    values = torch.tensor([9.0, 3.0, 1.2, 1.0, 0.9, 0.7, 0.6, 0.3], dtype=torch.float64)
    floor = noise_floor(values.numpy(), 8, 8)
    assert noise_floor((values * size).numpy(), 8, 8) == pytest.approx(size * floor, rel=1e-9)
    assert int(count_above_noise(values * size, 8, 8)) == int((values > floor).sum()) == 2


def test_a_batch_has_the_counts_of_its_spectra() -> None:
    spectra = torch.linalg.svdvals(torch.randn(2, 3, 12, 30, generator=seeded()).double())
    spectra[1, 0] = 0.0
    spectra[0, 2, :5] *= 50.0
    counts = count_above_noise(spectra, 12, 30)
    assert counts.shape == (2, 3) and int(counts[1, 0]) == 0 and int(counts[0, 2]) == 5
    for place in np.ndindex(2, 3):
        values = spectra[place].numpy()
        assert int(counts[place]) == int((values > noise_floor(values, 12, 30)).sum())


@given(st.integers(1, 40), st.integers(0, 99), st.integers(0, 999), st.floats(0.0, 2.0), st.integers(0, 9))
def test_as_many_count_as_signal_as_lie_above_the_floor(
    count: int, more: int, seed: int, fall: float, signal: int
) -> None:
    falling = torch.exp(-fall * torch.arange(count))[:, None]
    values = torch.linalg.svdvals(falling * torch.randn(3, count, count + more, generator=seeded(seed)).double())
    values[:, :signal] *= torch.tensor([1.5, 3.0, 50.0])[:, None]
    spectra = values.numpy()
    above = [int((each > noise_floor(each, count, count + more)).sum()) for each in spectra]
    assert count_above_noise(values, count, count + more).tolist() == above
    ranks = [rank_by_noise_floor(each, count, count + more) for each in values]
    assert ranks == [max(1, number) for number in above]


def test_a_count_takes_a_width_for_each_spectrum() -> None:
    generator = seeded()
    spectra = [torch.linalg.svdvals(torch.randn(12, cols, generator=generator)).double() for cols in (12, 30, 400)]
    for values in spectra:
        values[:2] *= 2.0
    together = count_above_noise(torch.stack(spectra), 12, torch.tensor([12, 30, 400]))
    assert together.tolist() == [int(count_above_noise(v, 12, c)) for v, c in zip(spectra, (12, 30, 400), strict=True)]
    tall = count_above_noise(torch.stack(spectra), 40, torch.tensor([12, 12, 12]))
    assert tall.tolist() == [int(count_above_noise(values, 12, 40)) for values in spectra]


@pytest.mark.parametrize("size", [1e-150, 1.0, 1e150])
def test_a_count_takes_zeros_ties_and_any_size(size: float) -> None:
    def count(values: list[float]) -> int:
        return int(count_above_noise(size * torch.tensor(values, dtype=torch.float64), len(values), len(values)))

    assert [count([2.0]), count([2.0, 1e-3]), count([2.0, 0.0]), count([0.0, 0.0]), count([0.0] * 9)] == [1, 2, 1, 0, 0]
    assert [count([1.0] * 8), count([3.0, *[1.0] * 5]), count([3.0, 2.0, *[1.0] * 4])] == [0, 1, 2]
    assert count([3.0, 2.5, 0.0, 0.0, 0.0, 0.0]) == 2


def test_a_count_takes_signal_that_is_out_of_all_proportion_to_the_noise() -> None:
    values = torch.tensor([1e200, 1e-100, *[1e-107] * 6], dtype=torch.float64)
    assert int(count_above_noise(values, 8, 8)) == 2


def test_a_missing_value_is_refused() -> None:
    with pytest.raises(ValueError, match="needs all its 64 singular values, but there are 8"):
        rank_by_noise_floor(torch.ones(8), 64, 100)
