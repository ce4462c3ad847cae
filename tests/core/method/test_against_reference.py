"""Whole restarts against the formulas in NumPy float64, given the same random numbers, on hostile input too."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from aclora_core.method.restart import restart_adapter
from tests.support import reference
from tests.support.reference import Array

KINDS = ("random", "falling", "steep", "low rank", "tied", "zero up", "zero down")
MODES = ("paper", "product", "product_redraw")
# The relative error that the type of the weights allows, and how far powers of ten may take a factor.
TYPES = {
    torch.float64: (1e-7, 30),
    torch.float32: (2e-6, 15),
    torch.bfloat16: (2e-2, 15),
    torch.float16: (4e-3, 0),
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_layer(kind: str, rank: int, rows: int, cols: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = seeded(seed)
    down = torch.randn(rank, cols, generator=generator, dtype=torch.float64)
    up = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    if kind in ("falling", "steep"):
        up = up * torch.exp(-(0.5 if kind == "falling" else 4.0) * torch.arange(rank))
    elif kind == "low rank":
        down[1:] = down[:1]
    elif kind == "tied":
        down, up = torch.eye(rank, cols).double(), torch.eye(rows, rank).double()
    elif kind == "zero up":
        up = torch.zeros_like(up)
    elif kind == "zero down":
        down = torch.zeros_like(down)
    return down, up


def draws(seed: int, rank: int, cols: int, rows: int) -> tuple[Array, Array]:
    """The normal numbers that a restart of one layer takes: for lora_down, then for the transpose of lora_up."""
    generator = seeded(seed)
    down = torch.randn((1, rank, cols), generator=generator)[0].double().numpy()
    return down, torch.randn((1, rank, rows), generator=generator)[0].double().numpy().T


def redrawn(matrix: Array, kept: int, noise: Array) -> Array:
    """AC-LoRA Eq. 2; a matrix whose noise is mere rounding stays."""
    signal, level = reference.restart_parts(matrix, kept)
    return matrix if level <= 1e-7 * math.sqrt(float((matrix**2).mean())) else signal + level * noise


def product(down: Array, up: Array, kept: int, noise: tuple[Array, Array], redraw_delta: bool) -> tuple[Array, Array]:
    """The new delta, and the fresh rows of lora_down."""
    u, d, vh = np.linalg.svd(up @ down, full_matrices=False)
    u, v, rank = u[:, :kept], vh[:kept], len(down)
    size = math.sqrt(float((down**2).sum()) / rank)
    fresh = noise[0][kept:] * size / math.sqrt(down.shape[1])
    fresh = fresh - fresh @ v.T @ v
    new = (u * d[:kept]) @ v
    if redraw_delta:
        columns = noise[1][:, kept:] - u @ (u.T @ noise[1][:, kept:])
        drawn = columns @ fresh
        lost = float((d[kept:] ** 2).sum())
        new = new + drawn * math.sqrt(lost / float((drawn**2).sum())) if (drawn**2).sum() > 0 else new
    return new, fresh


def has_gap(values: Array, kept: int, least: float) -> bool:
    """Whether it is clear which directions are signal: not where equal values stand on both sides of the split."""
    return kept >= len(values) or values[kept - 1] - values[kept] > least * values[0]


layers = st.tuples(
    st.sampled_from(KINDS), st.integers(1, 9), st.integers(1, 14), st.integers(1, 14), st.integers(0, 999)
)


@settings(max_examples=150)
@given(
    layers,
    st.sampled_from(MODES),
    st.sampled_from(["energy", "sum"]),
    st.floats(0.1, 0.99),
    st.sampled_from(sorted(TYPES, key=str)),
    st.integers(-30, 30),
    st.sampled_from([-2.0, 1e-6, 1.0, 1e6]),
)
def test_every_mode_follows_the_formulas(layer, mode, measure, threshold, dtype, power: int, scale: float) -> None:
    tolerance, most = TYPES[dtype]
    factor = 10.0 ** max(-most, min(most, power))
    lora_down, lora_up = ((tensor * factor).to(dtype) for tensor in make_layer(*layer))
    down, up = (tensor.double().numpy().copy() for tensor in (lora_down, lora_up))
    values = [reference.singular_values(matrix) for matrix in (down, up, up @ down)]
    values[2] = values[2][: len(down)]
    assume(all(reference.distance_to_tie(each, threshold, measure) > 1e-6 for each in values))
    result = restart_adapter({"a": (lora_down, lora_up, scale)}, threshold, seeded(5), mode, measure)["a"]
    kept = [reference.signal_count(each, threshold, measure) for each in values]
    assert [result.rank.kept_down, result.rank.kept_up, result.rank.kept_delta] == kept
    largest = float(values[2][0])
    np.testing.assert_allclose(result.spectrum, abs(scale) * values[2], rtol=1e-6, atol=1e-7 * abs(scale) * largest)
    new_down, new_up = lora_down.double().numpy(), lora_up.double().numpy()
    assert np.isfinite(new_down).all() and np.isfinite(new_up).all()
    noise = draws(5, len(down), down.shape[1], len(up))
    if mode == "paper":
        for new, old, count, random, each in zip((new_down, new_up), (down, up), kept, noise, values, strict=False):
            if has_gap(each, count, 1e-3):
                allowed = tolerance * 8 * abs(old).max()
                np.testing.assert_allclose(new, redrawn(old, count, random), rtol=0, atol=allowed)
    elif largest == 0 or kept[2] == len(down):
        assert np.array_equal(new_down, down) and np.array_equal(new_up, up)
    elif has_gap(values[2], kept[2], 1e-3):
        delta, fresh = product(down, up, kept[2], noise, mode == "product_redraw")
        sizes = float(np.linalg.norm(new_up, axis=0) @ np.linalg.norm(new_down, axis=1))
        np.testing.assert_allclose(new_up @ new_down, delta, rtol=0, atol=tolerance * (sizes + largest))
        np.testing.assert_allclose(new_down[kept[2] :], fresh, rtol=0, atol=tolerance * 8 * abs(down).max())


@pytest.mark.parametrize("factor", ["down", "up"])
def test_paper_mode_redraws_both_factors_at_their_own_variance_and_independently(factor: str) -> None:
    down, up = make_layer("random", 32, 2048, 1024, 3)
    down[:3], up[:, :5] = 6.0 * down[:3], 3.0 * up[:, :5]
    old = {"down": down.clone().numpy(), "up": up.clone().numpy()}[factor]
    result = restart_adapter({"a": (down, up, 1.0)}, 0.7, seeded(1))["a"]
    kept = result.rank.kept_down if factor == "down" else result.rank.kept_up
    signal, level = reference.restart_parts(old, kept)
    noise = {"down": down, "up": up}[factor].numpy() - signal
    assert 1 <= kept < 16
    assert abs(noise.mean()) < 5 * level / math.sqrt(noise.size)
    assert abs(noise.var() / level**2 - 1) < 5 * math.sqrt(2 / noise.size)
    assert abs(((noise / level) ** 4).mean() - 3.0) < 5 * math.sqrt(96 / noise.size)  # as normal numbers have it
    for other in (signal, old - signal):
        assert abs(np.corrcoef(noise.ravel(), other.ravel())[0, 1]) < 5 / math.sqrt(noise.size)


def test_the_noise_of_the_two_factors_has_nothing_in_common() -> None:
    down, up = make_layer("random", 64, 512, 512, 4)
    signals = [reference.restart_parts(matrix.numpy(), 1)[0] for matrix in (down, up)]
    restart_adapter({"a": (down, up, 1.0)}, 0.01, seeded(1))
    of_down, of_up = down.numpy() - signals[0], (up.numpy() - signals[1]).T
    assert abs(np.corrcoef(of_down.ravel(), of_up.ravel())[0, 1]) < 5 / math.sqrt(of_down.size)


@pytest.mark.parametrize("mode", ["product", "product_redraw"])
def test_fresh_directions_are_normal_as_long_as_before_and_orthogonal_to_the_signal(mode) -> None:
    down, up = make_layer("falling", 24, 900, 4000, 6)
    size = float(down.norm()) / math.sqrt(24)
    result = restart_adapter({"a": (down, up, 1.0)}, 0.9, seeded(2), mode)["a"]
    kept = result.rank.kept_delta
    signal, fresh = down[:kept].numpy(), down[kept:].numpy()
    count = fresh.size
    assert 1 <= kept < 8
    np.testing.assert_allclose(signal @ signal.T, size**2 * np.eye(kept), rtol=0, atol=1e-6 * size**2)
    assert np.abs(fresh @ signal.T).max() < 1e-9 * size**2
    level = size / math.sqrt(fresh.shape[1])
    assert abs(fresh.mean()) < 5 * level / math.sqrt(count)
    # The projection takes `kept` of all directions away.
    assert abs(fresh.var() / level**2 - (1 - kept / fresh.shape[1])) < 5 * math.sqrt(2 / count)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("mode", MODES)
def test_a_gpu_keeps_the_same_signal(mode) -> None:
    def fresh() -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
        made = [make_layer("falling", 48, 300, 200, seed) for seed in range(20)]
        return {str(place): (down.float(), up.float(), 1.0) for place, (down, up) in enumerate(made)}

    on_cpu = fresh()
    on_gpu = {name: (down.cuda(), up.cuda(), scale) for name, (down, up, scale) in fresh().items()}
    expected, found = (restart_adapter(each, 0.7, seeded(0), mode) for each in (on_cpu, on_gpu))
    for name, result in found.items():
        assert result.rank.kept_delta == expected[name].rank.kept_delta
        torch.testing.assert_close(
            on_gpu[name][1].cpu() @ on_gpu[name][0].cpu(), on_cpu[name][1] @ on_cpu[name][0], rtol=1e-4, atol=1e-4
        )
