import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from aclora_core.method.ac_lora import restart_matrix
from aclora_core.method.rank_rules import rank_by_noise_floor
from aclora_core.method.restart import Mode, restart_adapter
from tests.support import reference

SHAPES = {
    "square": (6, 20, 20),
    "wide": (6, 12, 40),
    "again": (6, 20, 20),
    "tall": (4, 50, 9),
    "rank over size": (8, 30, 5),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_layers(
    seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Layers of several shapes, with falling components, one convolution and one with lora_up still zero."""
    generator = seeded(seed)
    layers = {}
    for name, (rank, rows, cols) in SHAPES.items():
        fall = torch.exp(-0.5 * torch.arange(rank))
        down, up = torch.randn(rank, cols, generator=generator), torch.randn(rows, rank, generator=generator) * fall
        layers[name] = (down.to(dtype), up.to(dtype), 0.5)
    down, up = torch.randn(4, 3, 3, 3, generator=generator), torch.randn(7, 4, 1, 1, generator=generator)
    layers["conv"] = (down.to(dtype), up.to(dtype), -2.0)
    layers["fresh"] = (torch.randn(4, 10, generator=generator).to(dtype), torch.zeros(9, 4, dtype=dtype), 1.0)
    return layers


def delta(layer: tuple[torch.Tensor, torch.Tensor, float]) -> np.ndarray:
    down, up, scale = layer
    return reference.delta(down.flatten(1).double().numpy(), up.flatten(1).double().numpy(), scale)


def copied(layers):
    return {name: (down.clone(), up.clone(), scale) for name, (down, up, scale) in layers.items()}


def restart_product(
    lora_down: torch.Tensor, lora_up: torch.Tensor, threshold: float, seed: int, mode: Mode = "product"
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """New factors of one layer, and the number of the delta's components kept. The inputs are not modified."""
    down, up = lora_down.clone(), lora_up.clone()
    result = restart_adapter({"layer": (down, up, 1.0)}, threshold, seeded(seed), mode)
    return down, up, result["layer"].rank.kept_delta


@pytest.mark.parametrize("mode", ["paper", "product", "product_redraw"])
@pytest.mark.parametrize("measure", ["energy", "sum"])
def test_reported_ranks_spectra_and_energy_are_those_of_the_built_matrices(mode, measure) -> None:
    layers = make_layers()
    before = copied(layers)
    results = restart_adapter(layers, 0.7, seeded(), mode, measure)
    assert list(results) == list(layers)
    for name, result in results.items():
        down, up, _ = before[name]
        values = reference.singular_values(delta(before[name]))[: min(*down.flatten(1).shape, len(up))]
        for found, matrix in ((result.rank.kept_down, down), (result.rank.kept_up, up)):
            d = reference.singular_values(matrix.flatten(1).double().numpy())
            assert found == reference.signal_count(d, 0.7, measure)
        assert result.rank.kept_delta == reference.signal_count(values, 0.7, measure)
        np.testing.assert_allclose(result.spectrum, values, rtol=1e-6, atol=1e-7)
        kept = values[: result.rank.kept_delta]
        assert result.rank.energy == pytest.approx(
            float((kept**2).sum() / (values**2).sum()) if name != "fresh" else 1.0
        )
        jump = np.linalg.norm(delta(layers[name]) - delta(before[name]))
        assert result.rank.jump == pytest.approx(
            jump / np.linalg.norm(delta(before[name])) if name != "fresh" else 0.0, rel=1e-4
        )
        assert result.redrawn_down == (not torch.equal(layers[name][0], down))
        assert result.redrawn_up == (not torch.equal(layers[name][1], up))


def test_paper_mode_restarts_each_matrix_by_itself() -> None:
    layers = {"a": make_layers()["square"]}
    before = copied(layers)["a"]
    result = restart_adapter(layers, 0.7, seeded(5))["a"]
    expected, kept = restart_matrix(before[0], 0.7, seeded(5))
    torch.testing.assert_close(layers["a"][0], expected)
    assert result.rank.kept_down == kept and result.redrawn_down and result.redrawn_up and result.rank.jump > 0.01


def test_paper_mode_leaves_a_zero_lora_up_zero() -> None:
    layers = {"fresh": make_layers()["fresh"]}
    result = restart_adapter(layers, 0.7, seeded())["fresh"]
    assert not layers["fresh"][1].any() and result.redrawn_down and not result.redrawn_up
    assert (result.rank.kept_up, result.rank.kept_delta, result.rank.energy, result.rank.jump) == (1, 1, 1.0, 0.0)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 999), st.floats(0.1, 0.95), st.sampled_from(["energy", "sum"]))
def test_product_mode_changes_the_delta_by_the_discarded_part_alone(seed: int, threshold: float, measure) -> None:
    layers = make_layers(seed)
    before = copied(layers)
    results = restart_adapter(layers, threshold, seeded(seed), "product", measure)
    for name, result in results.items():
        expected = reference.best_approximation(delta(before[name]), result.rank.kept_delta)
        np.testing.assert_allclose(delta(layers[name]), expected, rtol=0, atol=1e-5 * max(1.0, np.abs(expected).max()))
        if name != "fresh":
            new_down, new_up = (tensor.flatten(1) for tensor in layers[name][:2])
            assert not new_up[:, result.rank.kept_delta :].any()
            assert new_down.norm(dim=1).min() > 0
            assert result.rank.jump == pytest.approx(math.sqrt(max(0.0, 1.0 - result.rank.energy)), abs=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 999), st.floats(0.1, 0.95))
def test_product_redraw_keeps_signal_and_energy_but_not_the_noise(seed: int, threshold: float) -> None:
    layers = make_layers(seed)
    before = copied(layers)
    for name, result in restart_adapter(layers, threshold, seeded(seed), "product_redraw").items():
        old, new, kept = delta(before[name]), delta(layers[name]), result.rank.kept_delta
        signal = reference.best_approximation(old, kept)
        old_noise, new_noise = old - signal, new - signal
        tolerance = 1e-5 * max(1.0, float(np.linalg.norm(old)))
        assert np.linalg.norm(new_noise) == pytest.approx(np.linalg.norm(old_noise), rel=1e-4, abs=tolerance)
        assert np.abs(signal.T @ new_noise).max() <= tolerance * np.linalg.norm(old) + 1e-12
        assert np.abs(new_noise @ signal.T).max() <= tolerance * np.linalg.norm(old) + 1e-12


def test_product_redraw_spreads_its_noise_evenly() -> None:
    generator = seeded(1)
    down, up = torch.randn(32, 300, generator=generator), torch.randn(200, 32, generator=generator)
    up[:, 0] *= 30.0
    signal = reference.best_approximation(delta((down, up, 1.0)), 1)
    noise = np.zeros_like(signal)
    for seed in range(30):
        new_down, new_up, kept = restart_product(down, up, 0.9, seed, "product_redraw")
        assert kept == 1
        noise += delta((new_down, new_up, 1.0)) - signal
    level = np.sqrt(((delta((down, up, 1.0)) - signal) ** 2).mean())
    # The mean of 30 draws shrinks by √30 in every entry alike, and has no direction of its own.
    assert noise.std() / 30 == pytest.approx(level / math.sqrt(30), rel=0.1)
    assert abs(noise.mean() / 30) < 5 * level / math.sqrt(30 * noise.size / 32)
    assert np.corrcoef(noise.ravel(), (delta((down, up, 1.0)) - signal).ravel())[0, 1] == pytest.approx(0.0, abs=0.05)


def test_product_keeps_the_size_of_lora_down_and_its_inputs() -> None:
    down, up, _ = make_layers()["square"]
    kept_down, kept_up = down.clone(), up.clone()
    new_down, new_up, kept = restart_product(down, up, 0.7, 0)
    assert torch.equal(down, kept_down) and torch.equal(up, kept_up) and 1 <= kept < 6
    assert float(new_down.norm() / down.norm()) == pytest.approx(1.0, abs=0.2)


def test_same_seed_same_adapter_and_every_layer_its_own_noise() -> None:
    for mode in ("paper", "product", "product_redraw"):
        one, two, other = (make_layers() for _ in range(3))
        one["again"] = two["again"] = other["again"] = tuple(  # type: ignore[assignment]
            part.clone() if isinstance(part, torch.Tensor) else part for part in one["square"]
        )
        one, two, other = copied(one), copied(two), copied(other)
        for layers, seed in ((one, 1), (two, 1), (other, 2)):
            restart_adapter(layers, 0.5, seeded(seed), mode)
        assert all(torch.equal(one[name][0], two[name][0]) and torch.equal(one[name][1], two[name][1]) for name in one)
        assert not torch.equal(one["wide"][0], other["wide"][0])
        assert not torch.equal(one["square"][0], one["again"][0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mode", ["paper", "product", "product_redraw"])
def test_parameters_of_any_type_are_changed_in_place(dtype: torch.dtype, mode) -> None:
    layers = {
        name: (torch.nn.Parameter(down), torch.nn.Parameter(up), scale)
        for name, (down, up, scale) in make_layers(dtype=dtype).items()
    }
    before = copied(layers)
    results = restart_adapter(layers, 0.6, seeded(), mode)
    for name, (down, up, _) in layers.items():
        assert down.dtype == up.dtype == dtype and down.requires_grad and down.is_leaf and down.grad_fn is None
        assert bool(torch.isfinite(down).all()) and bool(torch.isfinite(up).all())
        assert results[name].redrawn_down == (not torch.equal(down, before[name][0]))


@pytest.mark.parametrize("power", [-18, 18])
@pytest.mark.parametrize("mode", ["paper", "product", "product_redraw"])
def test_huge_and_tiny_factors_keep_as_many_components(power: int, mode) -> None:
    plain, scaled = make_layers(), make_layers()
    for down, up, _ in scaled.values():
        down *= 10.0**power
        up *= 10.0**power
    expected, found = (restart_adapter(layers, 0.7, seeded(), mode) for layers in (plain, scaled))
    assert [result.rank.kept_delta for result in found.values()] == [r.rank.kept_delta for r in expected.values()]
    for name, (down, up, _) in scaled.items():
        torch.testing.assert_close(down / 10.0**power, plain[name][0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(up / 10.0**power, plain[name][1], rtol=1e-3, atol=1e-4)


def test_chunks_change_neither_ranks_nor_spectra(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = restart_adapter(make_layers(), 0.7, seeded())
    monkeypatch.setattr("aclora_core.method.layer_groups.CHUNK", 1)
    for name, result in restart_adapter(make_layers(), 0.7, seeded()).items():
        # The jump is another one, since the noise is drawn in another order.
        assert replace(result.rank, jump=0.0) == replace(whole[name].rank, jump=0.0)
        np.testing.assert_allclose(result.spectrum, whole[name].spectrum, rtol=1e-9)


@pytest.mark.parametrize("threshold", ["noise floor", 0.7])
@pytest.mark.parametrize("mode", ["paper", "product"])
def test_a_layer_has_the_same_signal_alone_and_among_others(threshold, mode) -> None:
    """Layers of one rank are worked on together, in an order of their own."""
    together = make_layers()
    for number, (rows, cols) in enumerate([(30, 50), (20, 20), (30, 20), (20, 50), (30, 50)]):
        generator = seeded(number)
        down, up = torch.randn(6, cols, generator=generator), torch.randn(rows, 6, generator=generator)
        up[:, : number % 3] *= 30.0
        together[f"more {number}"] = (down, up, 0.1 * (number + 1))
    before = copied(together)
    results = restart_adapter(together, threshold, seeded(), mode)
    for name, layer in copied(before).items():
        alone = restart_adapter({name: layer}, threshold, seeded(), mode)[name]
        assert replace(alone.rank, jump=0.0, energy=0.0) == replace(results[name].rank, jump=0.0, energy=0.0)
        assert alone.rank.energy == pytest.approx(results[name].rank.energy)
        np.testing.assert_allclose(alone.spectrum, results[name].spectrum, rtol=1e-9, atol=1e-9)
        assert (alone.redrawn_down, alone.redrawn_up) == (results[name].redrawn_down, results[name].redrawn_up)
        if mode == "product":
            tolerance = 2e-5 * np.abs(delta(layer)).max()
            np.testing.assert_allclose(delta(layer), delta(together[name]), rtol=0, atol=tolerance)
        else:
            counts = alone.rank.kept_down, alone.rank.kept_up
            for new, old, kept in zip(together[name], before[name], counts, strict=False):
                signal, level = reference.restart_parts(old.flatten(1).double().numpy(), kept)
                noise = new.flatten(1).double().numpy() - signal
                assert noise.std() == pytest.approx(level, rel=0.5, abs=1e-6)


def test_noise_floor_of_a_factor_is_that_of_its_matrix() -> None:
    layers = make_layers()
    layers["rank over both"] = (torch.randn(20, 5, generator=seeded(7)), torch.randn(7, 20, generator=seeded(8)), 1.0)
    layers["planted"] = (
        torch.randn(6, 300, generator=seeded(1)) * torch.tensor([9.0, 5.0, 1.0, 1.0, 1.0, 1.0])[:, None],
        torch.randn(200, 6, generator=seeded(2)) * torch.tensor([9.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        1.0,
    )
    before = copied(layers)
    results = restart_adapter(layers, "noise floor", seeded())
    for name, result in results.items():
        for factor, kept in zip(before[name], (result.rank.kept_down, result.rank.kept_up), strict=False):
            values = reference.singular_values(factor.flatten(1).double().numpy())
            floor = reference.noise_floor(values, *factor.flatten(1).shape)
            # The singular values of a zero matrix and of exact low rank are rounding.
            assert kept == max(1, int((values > max(floor, 1e-12)).sum())), name
    assert (results["planted"].rank.kept_down, results["planted"].rank.kept_up) == (2, 1)


class Launches(TorchDispatchMode):
    """Counts what a GPU would have to launch."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["paper", "product", "product_redraw"])
def test_more_layers_cost_no_launches_and_another_shape_costs_few(mode) -> None:
    def launches(widths: list[int], of_each: int) -> int:
        layers = {
            f"{width} {number}": (torch.randn(4, width), torch.randn(width, 4), 1.0)
            for width in widths
            for number in range(of_each)
        }
        with Launches() as launched:
            restart_adapter(layers, "noise floor", seeded(), mode)
        return launched.count

    one = launches([8], 3)
    assert launches([8], 30) == one
    assert 10 <= (launches([8, 12, 16, 20], 3) - one) / (3 * 2) <= 35


def test_rank_one_has_no_noise_to_redraw() -> None:
    layers = {"one": (torch.randn(1, 9), torch.randn(7, 1), 1.0)}
    before = copied(layers)
    for mode in ("paper", "product", "product_redraw"):
        result = restart_adapter(layers, 0.9, seeded(), mode)["one"]
        assert not (result.redrawn_down or result.redrawn_up) and result.rank.jump == 0.0
        assert torch.equal(layers["one"][0], before["one"][0]) and torch.equal(layers["one"][1], before["one"][1])


def test_a_broken_layer_is_named_and_nothing_is_changed() -> None:
    for part, name, factor in ((0, "wide", "lora_down"), (1, "conv", "lora_up")):
        layers = make_layers()
        layers[name][part].view(-1)[3] = math.nan
        before = copied(layers)
        with pytest.raises(ValueError, match=f"Layer '{name}': {factor} holds NaN"):
            restart_adapter(layers, 0.7, seeded())
        assert all(torch.equal(layers[n][0].nan_to_num(), before[n][0].nan_to_num()) for n in layers)


def test_settings_out_of_range_are_refused_and_no_layers_are_no_error() -> None:
    with pytest.raises(ValueError, match="mode must be one of paper, product, product_redraw, but is 'sum'"):
        restart_adapter(make_layers(), 0.5, seeded(), "sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threshold"):
        restart_adapter(make_layers(), 1.5, seeded())
    assert restart_adapter({}, 0.5, seeded()) == {}


def test_noise_floor_finds_the_rank_that_was_planted_in_the_delta() -> None:
    for seed in range(10):
        generator = seeded(seed)
        down, up = torch.randn(16, 200, generator=generator), 0.02 * torch.randn(150, 16, generator=generator)
        up[:, :3] += torch.randn(150, 3, generator=generator)
        assert restart_adapter({"a": (down, up, 1.0)}, "noise floor", generator, "product")["a"].rank.kept_delta == 3


def test_noise_floor_of_the_delta_is_that_of_its_square_core() -> None:
    for result in restart_adapter(make_layers(), "noise floor", seeded(), "product").values():
        values = torch.tensor(result.spectrum, dtype=torch.float64)
        assert result.rank.kept_delta == rank_by_noise_floor(values, len(values), len(values))
