import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from aclora_core.method.ac_lora import dynamic_threshold, restart_layer, restart_matrix, signal_count
from aclora_core.method.thresholds import is_restart_epoch
from tests.support import reference

KINDS = ("random", "steep", "low rank", "tied", "zero")
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def make_matrix(kind: str, rows: int, cols: int, seed: int) -> torch.Tensor:
    matrix = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    if kind == "steep":
        matrix = matrix * torch.exp(-torch.arange(rows, dtype=torch.float32))[:, None]
    elif kind == "low rank":
        matrix = matrix[:, :1] @ matrix[:1]
    elif kind == "tied":
        matrix = torch.eye(rows, cols)
    elif kind == "zero":
        matrix = torch.zeros(rows, cols)
    return matrix


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


matrices = st.builds(make_matrix, st.sampled_from(KINDS), st.integers(1, 14), st.integers(1, 14), st.integers(0, 999))
measures = st.sampled_from(["energy", "sum"])
spectra = st.lists(st.floats(0.0, 100.0, width=32), min_size=1, max_size=20).map(
    lambda values: torch.tensor(sorted(values, reverse=True))
)


@settings(deadline=None, max_examples=80)
@given(spectra, st.floats(0.0, 1.0), measures)
def test_signal_count_follows_equation_3(values: torch.Tensor, threshold: float, measure) -> None:
    numbers = values.double().numpy()
    assume(reference.distance_to_tie(numbers, threshold, measure) > 1e-12)
    assert signal_count(values, threshold, measure) == reference.signal_count(numbers, threshold, measure)


def test_signal_count_is_strict_and_never_below_one() -> None:
    values = torch.tensor([2.0, 1.0, 1.0])
    assert [signal_count(values, p, "sum") for p in (0.0, 0.5, 0.51, 0.75, 0.76, 1.0)] == [1, 1, 1, 1, 2, 2]
    assert [signal_count(values, p) for p in (4 / 6, 0.8, 5 / 6 + 1e-9)] == [1, 1, 2]
    assert signal_count(torch.zeros(4), 0.9) == signal_count(torch.ones(1), 1.0) == 1


@pytest.mark.parametrize("magnitude", [1e-40, 1e-30, 1e30, 3e38])
def test_signal_count_does_not_depend_on_the_magnitude(magnitude: float) -> None:
    values = torch.tensor([1.0, 0.9, 0.5, 0.1]) * magnitude
    assert signal_count(values, 0.9) == 2 and signal_count(values, 0.9, "sum") == 2


@settings(deadline=None, max_examples=60)
@given(st.floats(0.0, 1.0), st.integers(0, 50), st.integers(1, 50))
def test_threshold_follows_equations_5_and_6(loss: float, epoch: int, more: int) -> None:
    expected = reference.dynamic_threshold(loss, epoch, epoch + more)
    assert dynamic_threshold(loss, epoch, epoch + more) == pytest.approx(expected, abs=1e-12)
    assert dynamic_threshold(loss, epoch, epoch + more, 0.3, 0.6) == pytest.approx(
        min(max(expected, 0.3), 0.6), abs=1e-12
    )


def test_threshold_rises_with_falling_loss_and_with_time() -> None:
    assert dynamic_threshold(0.5, 0, 100) == 0.5 and dynamic_threshold(0.5, 100, 100) == 0.75
    assert dynamic_threshold(0.1, 10, 100) > dynamic_threshold(0.2, 10, 100)
    assert dynamic_threshold(1.0, 5, 10) == dynamic_threshold(1e300, 5, 10) == 0.0


def test_bad_threshold_input_is_refused() -> None:
    for loss in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="loss"):
            dynamic_threshold(loss, 1, 10)
    for epoch, total in ((11, 10), (-1, 10), (0, 0)):
        with pytest.raises(ValueError, match="epoch"):
            dynamic_threshold(0.5, epoch, total)
    for low, high in ((0.6, 0.4), (-0.1, 1.0), (0.0, 1.1)):
        with pytest.raises(ValueError, match="range"):
            dynamic_threshold(0.5, 1, 10, low, high)
    for threshold in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="threshold"):
            signal_count(torch.ones(3), threshold)
    with pytest.raises(ValueError, match="energy, sum, but is 'entropy'"):
        signal_count(torch.ones(3), 0.5, "entropy")  # type: ignore[arg-type]
    for bad in (torch.ones(0), torch.tensor([math.nan, 1.0]), torch.ones(2, 2)):
        with pytest.raises(ValueError, match="spectrum"):
            signal_count(bad, 0.5)


def test_no_restart_in_the_last_interval() -> None:
    assert [epoch for epoch in range(41) if is_restart_epoch(epoch, 10, 40)] == [10, 20, 30]
    assert [epoch for epoch in range(40) if is_restart_epoch(epoch, 10, 39)] == [10, 20]
    assert not any(is_restart_epoch(epoch, 10, 19) for epoch in range(20))
    with pytest.raises(ValueError, match="interval"):
        is_restart_epoch(1, 0, 10)


def drawn(seed: int, shape: tuple[int, int]) -> np.ndarray:
    """The normal numbers that a restart with this seed uses."""
    return torch.randn((1, *shape), generator=seeded(seed))[0].double().numpy()


@settings(deadline=None, max_examples=100)
@given(matrices, st.integers(-30, 30), st.floats(0.05, 0.99), measures, st.sampled_from(sorted(TOLERANCE, key=str)))
def test_restart_matrix_follows_equation_2(matrix, power: int, threshold: float, measure, dtype: torch.dtype) -> None:
    matrix = (matrix * 10.0 ** (power if dtype != torch.float16 else 0)).to(dtype)
    exact = matrix.double().numpy()
    values = reference.singular_values(exact)
    assume(reference.distance_to_tie(values, threshold, measure) > 1e-6)
    new, kept = restart_matrix(matrix, threshold, seeded(7), measure)
    assert kept == reference.signal_count(values, threshold, measure)
    assert new.shape == matrix.shape and new.dtype == dtype
    # Equal values at the split leave it open which of their directions is signal.
    assume(kept == len(values) or values[kept - 1] - values[kept] > 1e-3 * values[0] or values[kept] == 0)
    signal, level = reference.restart_parts(exact, kept)
    largest = np.abs(exact).max()
    error = np.abs(new.double().numpy() - (signal + level * drawn(7, exact.shape))).max()
    assert error <= 8 * TOLERANCE[dtype] * largest


def test_noise_has_the_variance_it_replaces_and_knows_nothing_of_the_signal() -> None:
    matrix = make_matrix("random", 32, 4096, 1)
    matrix[:4] *= 8.0
    new, kept = restart_matrix(matrix, 0.8, seeded(3))
    signal, level = reference.restart_parts(matrix.double().numpy(), kept)
    noise, old = new.double().numpy() - signal, matrix.double().numpy() - signal
    size = noise.size
    assert 1 < kept < 8
    assert abs(noise.mean()) < 5 * level / math.sqrt(size)
    assert abs(noise.var() / level**2 - 1) < 5 * math.sqrt(2 / size)
    for other in (signal, old):
        assert abs(np.corrcoef(noise.ravel(), other.ravel())[0, 1]) < 5 / math.sqrt(size)


def test_same_seed_same_matrix_and_the_input_is_unchanged() -> None:
    matrix = make_matrix("random", 6, 40, 2)
    before = matrix.clone()
    first, _ = restart_matrix(matrix, 0.5, seeded(1))
    assert torch.equal(matrix, before)
    assert torch.equal(first, restart_matrix(matrix, 0.5, seeded(1))[0])
    assert not torch.equal(first, restart_matrix(matrix, 0.5, seeded(2))[0])


def test_zero_and_exactly_low_rank_matrices_get_no_noise() -> None:
    for kind in ("zero", "low rank"):
        matrix = make_matrix(kind, 8, 30, 0)
        new, kept = restart_matrix(matrix, 0.9, seeded())
        assert kept == 1 and torch.equal(new, matrix)


def test_a_convolution_keeps_its_shape_and_gradients_stay_out() -> None:
    weight = torch.nn.Parameter(torch.randn(6, 4, 3, 3))
    new, kept = restart_matrix(weight, 0.5, seeded())
    assert new.shape == weight.shape and not new.requires_grad
    assert torch.equal(new.flatten(1), restart_matrix(weight.flatten(1), 0.5, seeded())[0]) and 1 <= kept < 6


def test_a_layer_restarts_both_factors_at_the_threshold_of_its_loss() -> None:
    down, up = torch.randn(6, 4, 3, 3, generator=seeded(1)), torch.randn(20, 6, 1, 1, generator=seeded(2))
    before = down.clone(), up.clone()
    new_down, new_up = restart_layer(down, up, 0.4, 3, 20, seeded(5))
    generator, threshold = seeded(5), dynamic_threshold(0.4, 3, 20)
    assert torch.equal(new_down, restart_matrix(down, threshold, generator)[0])
    assert torch.equal(new_up.flatten(1).mT, restart_matrix(up.flatten(1).mT, threshold, generator)[0])
    assert new_up.shape == up.shape and new_down.is_contiguous() and new_up.is_contiguous()
    assert torch.equal(down, before[0]) and torch.equal(up, before[1])


def test_a_matrix_that_is_not_finite_is_refused() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="NaN or infinity"):
            restart_matrix(torch.tensor([[bad, 1.0]]), 0.5, seeded())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_and_cpu_restart_to_the_same_matrix() -> None:
    for matrix in torch.randn(10, 48, 200, generator=seeded()):
        on_cpu, kept = restart_matrix(matrix, 0.7, seeded())
        on_gpu, kept_gpu = restart_matrix(matrix.cuda(), 0.7, seeded())
        assert kept == kept_gpu and on_gpu.device.type == "cuda"
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-5, atol=1e-5)
