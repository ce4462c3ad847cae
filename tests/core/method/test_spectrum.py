import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from aclora_core.method import rank_rules
from aclora_core.method.rank_rules import (
    rank_by_energy,
    rank_by_frobenius,
    rank_by_knee,
    rank_by_noise_floor,
    rank_by_ratio,
    rank_by_sum,
    rank_by_threshold,
    rank_fixed,
)
from aclora_core.method.spectrum import (
    delta_singular_values,
    effective_rank,
    energy_kept,
    stable_rank,
    sum_kept,
    truncate,
)
from tests.support import reference

KINDS = ("random", "steep", "low rank", "tied", "zero up")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def make_factors(kind: str, rank: int, rows: int, cols: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, cols, generator=generator)
    up = torch.randn(rows, rank, generator=generator)
    if kind == "steep":
        up = up * torch.exp(-torch.arange(rank, dtype=torch.float32))
    elif kind == "low rank":
        up[:, 1:] = up[:, :1]
    elif kind == "tied":
        down, up = torch.eye(rank, cols), torch.eye(rows, rank)
    elif kind == "zero up":
        up = torch.zeros(rows, rank)
    return down, up


def as_numpy(*tensors: torch.Tensor) -> list[np.ndarray]:
    return [tensor.detach().double().numpy() for tensor in tensors]


factors = st.builds(
    make_factors,
    st.sampled_from(KINDS),
    st.integers(1, 12),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(0, 999),
)
scales = st.builds(lambda sign, power: sign * 10.0**power, st.sampled_from([-1.0, 1.0]), st.integers(-15, 15))
spectra = st.lists(st.floats(0.0, 100.0, width=32), min_size=1, max_size=20).map(
    lambda values: torch.tensor(sorted(values, reverse=True))
)


@settings(deadline=None, max_examples=60)
@given(factors, scales, st.sampled_from(DTYPES))
def test_delta_singular_values_are_those_of_the_built_delta(pair, scale: float, dtype: torch.dtype) -> None:
    down, up = pair[0].to(dtype), pair[1].to(dtype)
    found = delta_singular_values(down, up, scale)
    expected = reference.singular_values(reference.delta(*as_numpy(down, up), scale))[: min(*down.shape, len(up))]
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-7, atol=2e-7 * max(float(expected[0]), 1e-37))


@settings(deadline=None, max_examples=60)
@given(factors, scales, st.integers(1, 14), st.sampled_from(DTYPES))
def test_truncate_is_as_good_as_any_approximation_of_that_rank(
    pair, scale: float, rank: int, dtype: torch.dtype
) -> None:
    down, up = pair[0].to(dtype), pair[1].to(dtype)
    # A delta of 1e12 has factors of 1e6, which float16 does not hold.
    scale = math.copysign(1.0, scale) if dtype == torch.float16 else scale
    new_down, new_up = truncate(down, up, scale, rank)
    full = reference.delta(*as_numpy(down, up), scale)
    values = reference.singular_values(full)
    error = np.linalg.norm(reference.delta(*as_numpy(new_down, new_up), 1.0) - full)
    optimum = math.sqrt(float((values[rank:] ** 2).sum()))
    rounding = 4 * torch.finfo(dtype if dtype != torch.float64 else torch.float32).eps
    assert error <= optimum + rounding * float(np.linalg.norm(full)) + 1e-37
    assert new_down.shape[0] == new_up.shape[1] == min(rank, *down.shape, len(up))
    assert new_down.dtype == dtype and new_down.is_contiguous() and new_up.is_contiguous()


@settings(deadline=None, max_examples=20)
@given(factors, st.integers(1, 5))
def test_truncate_puts_the_root_of_each_value_on_both_sides(pair, rank: int) -> None:
    new_down, new_up = truncate(*pair, -2.0, rank)
    values = delta_singular_values(*pair, -2.0)[:rank]
    torch.testing.assert_close(new_down @ new_down.mT, values.diag(), rtol=1e-5, atol=1e-5 * float(values[0]))
    torch.testing.assert_close(new_up.mT @ new_up, values.diag(), rtol=1e-5, atol=1e-5 * float(values[0]))


def test_a_batch_gives_what_its_layers_give() -> None:
    layers = [make_factors(kind, 4, 9, 7, seed) for seed, kind in enumerate(KINDS)]
    down, up = (torch.stack(part) for part in zip(*layers, strict=True))
    scales = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0])
    values = delta_singular_values(down, up, scales)
    new_down, new_up = truncate(down, up, scales, 2)
    for i, (one_down, one_up) in enumerate(layers):
        torch.testing.assert_close(values[i], delta_singular_values(one_down, one_up, float(scales[i])))
        alone = truncate(one_down, one_up, float(scales[i]), 2)
        torch.testing.assert_close(new_up[i] @ new_down[i], alone[1] @ alone[0], rtol=1e-4, atol=1e-5)


def test_a_convolution_keeps_its_shape() -> None:
    down, up = torch.randn(6, 5, 3, 3), torch.randn(8, 6, 1, 1)
    new_down, new_up = truncate(down, up, 0.5, 6)
    assert new_down.shape == (6, 5, 3, 3) and new_up.shape == (8, 6, 1, 1)
    delta = 0.5 * up.flatten(1) @ down.flatten(1)
    torch.testing.assert_close(new_up.flatten(1) @ new_down.flatten(1), delta, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        delta_singular_values(down, up, 0.5), torch.linalg.svdvals(delta)[:6], rtol=1e-4, atol=1e-5
    )


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


def test_a_layer_of_20480_by_5120_is_handled_without_building_its_delta() -> None:
    down, up = torch.randn(64, 5120), torch.randn(20480, 64)
    with LargestTensor() as seen:
        values = delta_singular_values(down, up, 1.0)
        new_down, new_up = truncate(down, up, 1.0, 3)
    assert 20480 * 64 <= seen.numbers <= 20480 * 64 * 2
    assert values.shape == (64,) and new_down.shape == (3, 5120) and new_up.shape == (20480, 3)


PEAKS = """
import torch
from aclora_core.method import delta_singular_values, truncate

def peak_above(job):
    def resident(line):
        return next(int(each.split()[1]) for each in open("/proc/self/status") if each.startswith(line)) / 1024
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew from what is resident now
    before = resident("VmRSS")
    job()
    return resident("VmHWM") - before

torch.set_num_threads(1)
down, up = torch.randn(64, 5120), torch.randn(20480, 64)
truncate(down[:, :99], up[:99], 1.0, 3)  # loads what decompositions need
print(peak_above(lambda: delta_singular_values(down, up, 1.0)), peak_above(lambda: truncate(down, up, 1.0, 64)))
print(peak_above(lambda: up @ down))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can measure a peak anew")
def test_peak_memory_of_a_20480_by_5120_layer_stays_far_below_its_delta() -> None:
    """The delta takes 400 MiB, the factors 6. In float64, with what QR and SVD work on, it is ten times the factors."""
    root = Path(__file__).resolve().parents[3]
    result = subprocess.run([sys.executable, "-c", PEAKS], cwd=root, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    values, truncated, built = map(float, result.stdout.split())
    assert 5 < values < 80 and 5 < truncated < 80 and built > 390, result.stdout


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    down, up = torch.ones(2, 3), torch.ones(4, 2)
    up[1, 1] = bad
    with pytest.raises(ValueError, match="lora_up holds NaN or infinity"):
        delta_singular_values(down, up, 1.0)
    with pytest.raises(ValueError, match="lora_down holds NaN or infinity"):
        truncate(up, down.new_ones(3, 4), 1.0, 1)
    with pytest.raises(ValueError, match="scale"):
        delta_singular_values(down, torch.ones(4, 2), bad)
    with pytest.raises(ValueError, match="spectrum holds NaN"):
        effective_rank(torch.tensor([bad, 1.0]))


def test_factors_that_do_not_match_and_ranks_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) and lora_up \(4, 3\) do not match"):
        delta_singular_values(torch.ones(2, 3), torch.ones(4, 3), 1.0)
    with pytest.raises(ValueError, match="at least 1, but is 0"):
        truncate(torch.ones(2, 3), torch.ones(4, 2), 1.0, 0)
    for rank in (0, -3, math.nan):
        with pytest.raises(ValueError, match=f"rank to keep must be at least 1, but is {rank}"):
            rank_fixed(torch.ones(3), rank)
    with pytest.raises(ValueError, match="list of singular values"):
        rank_by_energy(torch.ones(0), 0.9)


@settings(deadline=None, max_examples=40)
@given(spectra)
def test_effective_and_stable_rank_lie_between_one_and_the_number_of_values(values: torch.Tensor) -> None:
    effective, stable = effective_rank(values), stable_rank(values)
    assert 1.0 - 1e-9 <= effective <= len(values) + 1e-9 and 1.0 <= stable <= len(values) + 1e-9
    assume(float(values[0]) > 0)
    assert effective == pytest.approx(reference.effective_rank(values.double().numpy()), rel=1e-9)
    assert stable == pytest.approx(float((values.double() ** 2).sum() / values[0].double() ** 2), rel=1e-9)


def test_effective_rank_of_equal_values_is_their_number_and_of_zero_is_one() -> None:
    assert effective_rank(torch.full((7,), 3.0)) == pytest.approx(7.0)
    assert effective_rank(torch.zeros(7)) == 1.0


@settings(deadline=None, max_examples=60)
@given(spectra, st.floats(0.01, 1.0))
def test_share_rules_keep_the_smallest_rank_that_reaches_the_share(values: torch.Tensor, keep: float) -> None:
    assume(float(values[0]) > 0)
    numbers = values.double().numpy()
    assume(reference.distance_to_tie(numbers, keep, "energy") > 1e-12)
    assume(reference.distance_to_tie(numbers, keep, "sum") > 1e-12)
    assert rank_by_energy(values, keep) == reference.smallest_reaching(numbers, keep, "energy")
    assert rank_by_sum(values, keep) == reference.smallest_reaching(numbers, keep, "sum")
    rank = rank_by_energy(values, keep)
    assert energy_kept(values, rank) >= keep - 1e-12
    assert rank == 1 or energy_kept(values, rank - 1) < keep
    assert energy_kept(values, len(values)) == sum_kept(values, len(values)) == 1.0


def test_rules_count_without_the_usual_error_of_one() -> None:
    values = torch.exp(-torch.arange(32) / 5.0)
    assert rank_by_frobenius(values, 0.9) == 5
    assert rank_by_sum(values, 0.9) == 12
    assert rank_by_ratio(values, 1 / 10) == 12
    assert rank_by_threshold(values, 0.1) == 12
    assert rank_by_threshold(torch.tensor([3.0, 2.0, 1.0]), 2.0) == 1


def test_knee_is_where_the_spectrum_turns_flat_and_not_an_end() -> None:
    assert rank_by_knee(torch.tensor([10.0, 9.0, 8.0, 0.2, 0.1, 0.1, 0.1, 0.1])) == 3
    for values in (torch.exp(-torch.arange(32) / 5.0), 1.0 / torch.arange(1, 33)):
        assert 3 <= rank_by_knee(values) <= 12
    assert rank_by_knee(torch.full((6,), 2.0)) == 6
    assert rank_by_knee(torch.linspace(5.0, 1.0, 9)) == 9


def test_zero_spectra_keep_one_component_by_every_rule() -> None:
    zero = torch.zeros(5)
    ranks = [rank_by_ratio(zero, 0.0), rank_by_sum(zero, 1.0), rank_by_energy(zero, 1.0)]
    ranks += [rank_by_frobenius(zero, 0.5), rank_by_threshold(zero, 0.0), rank_by_knee(zero)]
    ranks += [rank_by_noise_floor(zero, 5, 9), rank_fixed(zero, 1)]
    assert ranks == [1] * 8
    assert rank_fixed(zero, 99) == 5
    assert energy_kept(zero, 1) == sum_kept(zero, 1) == stable_rank(zero) == 1.0


@pytest.mark.parametrize(
    "rule, value",
    [("ratio", 1.0), ("sum", 0.0), ("energy", 1.1), ("frobenius", -0.5), ("threshold", -1.0), ("sum", math.nan)],
)
def test_parameters_outside_their_range_are_refused(rule: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"but is {value}"):
        getattr(rank_rules, f"rank_by_{rule}")(torch.ones(3), value)
