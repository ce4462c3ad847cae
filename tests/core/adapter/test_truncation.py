import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aclora_core.adapter.adapter import Adapter, Layer
from aclora_core.adapter.lora_file import load, save
from aclora_core.adapter.truncation import (
    _component_bytes,
    decompose,
    ranks_by_rule,
    ranks_for_size,
    total_energy_kept,
    truncate_to_ranks,
)
from aclora_core.method import rank_rules as spectrum
from aclora_core.method.rank_rules import Rule, rank_rule
from tests.support import reference

CONV = "lora_unet_input_blocks_1_0_in_layers_2"


def make_adapter(seed: int = 0, dtype: torch.dtype = torch.float32) -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    fall = torch.exp(-0.7 * torch.arange(8))
    layers = {
        "diffusion_model.blocks.0.attn": Layer(normal(8, 40), normal(30, 8) * fall, 4.0),
        "diffusion_model.blocks.1.attn": Layer(normal(8, 40), 0.1 * normal(30, 8) * fall, 8.0),
        "diffusion_model.blocks.1.mlp": Layer(normal(16, 12), normal(90, 16), 16.0),
        CONV: Layer(normal(6, 5, 3, 3), normal(20, 6, 1, 1), -3.0),
    }
    layers = {name: Layer(v.lora_down.to(dtype), v.lora_up.to(dtype), v.alpha) for name, v in layers.items()}
    extra = {"diffusion_model.blocks.2.mlp.diff": normal(7, 3)}
    return Adapter(layers, {"ss_output_name": "style"}, {"diffusion_model.blocks.2.mlp": "full difference"}, extra)


def delta(layer: Layer) -> np.ndarray:
    down, up = (factor.double().numpy() for factor in layer.factors())
    return reference.delta(down, up, layer.scale)


def truncated(adapter: Adapter, rule: Rule, **limits: int):
    decomposed = decompose(adapter)
    return truncate_to_ranks(adapter, decomposed, ranks_by_rule(decomposed, rule, **limits))


@pytest.mark.parametrize("rank", [1, 3, 5, 99])
def test_every_layer_becomes_its_best_approximation_at_scale_one(rank: int) -> None:
    adapter = make_adapter()
    result, stats = truncated(adapter, rank_rule("fixed", rank))
    for name, layer in result.layers.items():
        old = adapter.layers[name]
        full = min(old.rank, *delta(old).shape)
        assert layer.rank == stats[name].rank_after == min(rank, full) and layer.scale == 1.0
        expected = reference.best_approximation(delta(old), layer.rank)
        np.testing.assert_allclose(delta(layer), expected, rtol=0, atol=2e-6 * np.linalg.norm(expected))
        assert layer.lora_down.shape[1:] == old.lora_down.shape[1:] and layer.lora_up.shape[2:] == old.lora_up.shape[2:]
        assert layer.lora_down.is_contiguous() and layer.lora_up.is_contiguous()
    assert (result.metadata, result.other) == (adapter.metadata, adapter.other) and result.extra is adapter.extra


def test_the_statistics_match_the_energy_that_was_lost() -> None:
    adapter = make_adapter(dtype=torch.float16)
    result, stats = truncated(adapter, rank_rule("energy", 0.9))
    for name, summary in stats.items():
        old, new = adapter.layers[name], result.layers[name]
        values = reference.singular_values(delta(old))
        kept = values[: new.rank]
        assert new.lora_down.dtype == torch.float16
        assert (summary.rank_before, summary.rank_after) == (old.rank, new.rank)
        assert summary.energy_before == pytest.approx(float((values**2).sum()), rel=1e-5)
        assert summary.energy_kept == pytest.approx(float((kept**2).sum() / (values**2).sum()), rel=1e-5)
        assert summary.sum_kept == pytest.approx(float(kept.sum() / values.sum()), rel=1e-5)
        assert summary.bytes_before == 2 * (old.lora_down.numel() + old.lora_up.numel())
        assert summary.bytes_after == 2 * (new.lora_down.numel() + new.lora_up.numel())
        assert 0.9 <= summary.energy_kept < 1.0
    lost = sum(np.linalg.norm(delta(adapter.layers[n]) - delta(result.layers[n])) ** 2 for n in stats)
    total = sum(np.linalg.norm(delta(layer)) ** 2 for layer in adapter.layers.values())
    assert total_energy_kept(stats) == pytest.approx(1 - lost / total, abs=1e-4)


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("fixed", 3, lambda values: 3),
        ("ratio", 0.2, lambda values: spectrum.rank_by_ratio(values, 0.2)),
        ("sum", 0.8, lambda values: spectrum.rank_by_sum(values, 0.8)),
        ("energy", 0.8, lambda values: spectrum.rank_by_energy(values, 0.8)),
        ("frobenius", 0.8, lambda values: spectrum.rank_by_frobenius(values, 0.8)),
        ("threshold", 4.0, lambda values: spectrum.rank_by_threshold(values, 4.0)),
        ("knee", 0.0, spectrum.rank_by_knee),
        ("noise_floor", 0.0, lambda values: spectrum.rank_by_noise_floor(values, len(values), len(values))),
    ],
)
def test_each_rule_sees_the_singular_values_of_the_delta(name, value, expected) -> None:
    adapter = make_adapter()
    _, stats = truncated(adapter, rank_rule(name, value))
    for base, layer in adapter.layers.items():
        values = torch.from_numpy(reference.singular_values(delta(layer)))[: min(layer.rank, *delta(layer).shape)]
        assert stats[base].rank_after == expected(values)


def test_smallest_and_largest_rank_hold_and_bad_ones_are_refused() -> None:
    adapter = make_adapter()
    _, stats = truncated(adapter, rank_rule("energy", 0.95), min_rank=3, max_rank=4)
    assert {summary.rank_after for summary in stats.values()} == {3, 4}
    for low, high in ((0, 4), (5, 4)):
        with pytest.raises(ValueError, match=f"are {low} and {high}"):
            truncated(adapter, rank_rule("knee"), min_rank=low, max_rank=high)
    with pytest.raises(ValueError, match="noise_floor, but is 'best'"):
        rank_rule("best")  # type: ignore[arg-type]


@settings(deadline=None, max_examples=12)
@given(st.integers(3_500, 15_000), st.sampled_from([None, torch.float16]), st.sampled_from([0, 1]))
def test_the_file_never_exceeds_its_size_and_nothing_more_would_fit(tmp_path_factory, size, dtype, min_rank) -> None:
    adapter, path = make_adapter(), Path(tmp_path_factory.mktemp("truncated")) / "small.safetensors"
    decomposed = decompose(adapter)
    ranks = ranks_for_size(adapter, decomposed, size, dtype, min_rank=min_rank)
    result, stats = truncate_to_ranks(adapter, decomposed, ranks, dtype)
    save(result, path, result.metadata)
    written = path.stat().st_size
    assert written <= size
    # Spare is less than one more component, the header's reserve, and the names of the layers that were dropped.
    steps = [_component_bytes(layer, dtype) for n, layer in decomposed.items() if ranks[n] < len(layer.singular_values)]
    dropped = list(ranks.values()).count(0)
    assert not steps or size - written < min(steps) + 600 + 400 * dropped
    assert {n: layer.rank for n, layer in load(path).layers.items()} == {n: r for n, r in ranks.items() if r}
    assert all(summary.rank_after == ranks[n] for n, summary in stats.items())


def test_budget_goes_where_a_byte_buys_most() -> None:
    adapter = make_adapter()
    decomposed = decompose(adapter)
    ranks = ranks_for_size(adapter, decomposed, 8_000)
    cost = {name: _component_bytes(layer, None) for name, layer in decomposed.items()}
    density = {name: (layer.singular_values.square() / cost[name]).tolist() for name, layer in decomposed.items()}
    left_out = {name: density[name][rank] for name, rank in ranks.items() if rank < len(density[name])}
    last_taken = {name: density[name][rank - 1] for name, rank in ranks.items() if rank > 1}
    assert len(left_out) >= 3 and len(last_taken) >= 2
    # No layer could give back its last component for a better one of a layer that is no dearer.
    for name, value in left_out.items():
        assert all(value <= other for taken, other in last_taken.items() if cost[taken] >= cost[name])
    assert ranks["diffusion_model.blocks.0.attn"] > ranks["diffusion_model.blocks.1.attn"]


def planted(values: list[float], side: int) -> Layer:
    """A square layer with these singular values."""
    rank = len(values)
    return Layer(torch.eye(rank, side), torch.eye(side, rank) * torch.tensor(values), float(rank))


@pytest.mark.parametrize("dear_value, expected", [(1.5, {"cheap": 6, "dear": 2}), (3.0, {"cheap": 4, "dear": 3})])
def test_energy_per_byte_decides_and_neither_energy_nor_size_alone(dear_value: float, expected: dict) -> None:
    # A component of the dear layer takes four times the bytes: worth it at 3² = 9 against 1, not at 1.5² = 2.25.
    adapter = Adapter({"cheap": planted([1.0] * 6, 10), "dear": planted([dear_value] * 6, 40)})
    assert ranks_for_size(adapter, decompose(adapter), 2_110) == expected


def test_budget_over_layers_of_one_shape_keeps_the_largest_values_of_all() -> None:
    layers = {f"layer_{i}": Layer(torch.randn(6, 20), torch.randn(20, 6) * (i + 1), 6.0) for i in range(4)}
    adapter = Adapter(layers)
    decomposed = decompose(adapter)
    for size in range(3_000, 6_000, 500):
        ranks = ranks_for_size(adapter, decomposed, size, min_rank=0)
        pooled = torch.cat([layer.singular_values for layer in decomposed.values()]).sort(descending=True).values
        kept = torch.cat([decomposed[name].singular_values[:rank] for name, rank in ranks.items()])
        torch.testing.assert_close(kept.sort(descending=True).values, pooled[: len(kept)])


def test_a_large_size_truncates_nothing_and_a_too_small_one_is_refused_with_the_smallest() -> None:
    adapter = make_adapter()
    decomposed = decompose(adapter)
    whole = {name: len(layer.singular_values) for name, layer in decomposed.items()}
    assert ranks_for_size(adapter, decomposed, 10**6) == whole
    with pytest.raises(
        ValueError, match="A file of 100 bytes is too small: this LoRA takes at least ([0-9,]+) bytes"
    ) as error:
        ranks_for_size(adapter, decomposed, 100)
    least = int(str(error.value).split("at least ")[1].split(" ")[0].replace(",", ""))
    assert ranks_for_size(adapter, decomposed, least) == dict.fromkeys(whole, 1)
    with pytest.raises(ValueError, match="too small"):
        ranks_for_size(adapter, decomposed, least - 1)


def test_long_metadata_counts_towards_the_size() -> None:
    adapter = make_adapter()
    decomposed = decompose(adapter)
    plain = ranks_for_size(adapter, decomposed, 8_000)
    crowded = ranks_for_size(adapter, decomposed, 8_000, metadata={"notes": "é" * 500})
    assert sum(crowded.values()) < sum(plain.values())


def test_a_zero_layer_keeps_rank_one_and_a_layer_of_rank_zero_is_dropped() -> None:
    adapter = Adapter({"zero": Layer(torch.randn(4, 9), torch.zeros(7, 4), 4.0), **make_adapter().layers})
    result, stats = truncated(adapter, rank_rule("energy", 0.5))
    assert result.layers["zero"].rank == 1 and not delta(result.layers["zero"]).any()
    assert stats["zero"].energy_kept == 1.0 and math.isfinite(total_energy_kept(stats))
    decomposed = decompose(adapter)
    assert ranks_for_size(adapter, decomposed, 10**6, min_rank=0)["zero"] == 0
    result, stats = truncate_to_ranks(adapter, decomposed, {**dict.fromkeys(decomposed, 2), CONV: 0})
    assert CONV not in result.layers and stats[CONV].rank_after == 0 and stats[CONV].energy_kept == 0.0


def test_a_layer_that_cannot_be_decomposed_is_named() -> None:
    adapter = make_adapter()
    adapter.layers[CONV].lora_down[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=f"Layer '{CONV}': lora_down holds NaN"):
        decompose(adapter)
    huge = Adapter({"big": Layer(torch.full((1, 2), 1e6), torch.full((3, 1), 1e6), 1.0)})
    with pytest.raises(ValueError, match="Layer 'big' does not fit into torch.float16"):
        truncate_to_ranks(huge, decompose(huge), {"big": 1}, torch.float16)


def test_the_adapter_that_is_cut_stays_as_it_was_and_shares_no_memory() -> None:
    adapter = make_adapter()
    before = {name: layer.lora_down.clone() for name, layer in adapter.layers.items()}
    result, _ = truncated(adapter, rank_rule("fixed", 99))
    for layer in result.layers.values():
        layer.lora_down.zero_()
    assert all(torch.equal(adapter.layers[name].lora_down, tensor) for name, tensor in before.items())
