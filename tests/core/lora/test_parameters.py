"""The parameters of a new adapter: their flat layout, ranks, scales and initial values."""

import logging
import math

import pytest
import torch
from torch import nn

from aclora_core.adapter.adapter import Layer
from aclora_core.lora import parameters
from aclora_core.lora.parameters import FlatParameters, LoraLayer, LoraSpec, make_parameters

CPU = torch.device("cpu")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def new_branches(layers: dict[str, nn.Module], rank: int, alpha: float, seed: int = 0) -> dict[str, LoraLayer]:
    return make_parameters(layers, LoraSpec(rank, alpha), seeded(seed), CPU).layers


def test_the_rank_is_lowered_for_small_layers_and_the_scale_stays(caplog: pytest.LogCaptureFixture) -> None:
    layers = {"wide": nn.Linear(20, 30), "low": nn.Linear(20, 3), "thin": nn.Conv2d(1, 30, 2)}
    with caplog.at_level(logging.INFO, logger="aclora"):
        branches = new_branches(layers, 8, 4.0)
    assert {name: len(branch.lora_down) for name, branch in branches.items()} == {"wide": 8, "low": 3, "thin": 4}
    assert {name: branch.scale for name, branch in branches.items()} == dict.fromkeys(layers, 0.5)
    assert "2 of 3 layers" in caplog.text


def test_a_rank_above_every_layer_is_rejected_with_the_largest_that_fits() -> None:
    layers = {"a": nn.Linear(20, 6), "b": nn.Linear(7, 30)}
    with pytest.raises(ValueError, match=r"maximum rank is 8.*largest layer can only have rank 7.*7 or less"):
        new_branches(layers, 8, 4.0)
    assert len(new_branches(layers, 7, 4.0)["a"].lora_down) == 6


def test_initial_weights_depend_on_the_generator_alone() -> None:
    layers = {"a": nn.Linear(20, 6), "b": nn.Linear(7, 30)}
    first, again, other = (new_branches(layers, 4, 4.0, seed) for seed in (3, 3, 4))
    for name in layers:
        assert torch.equal(first[name].lora_down, again[name].lora_down)
        assert not torch.equal(first[name].lora_down, other[name].lora_down)


@pytest.mark.parametrize("chunk", [1, 7, 64, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_initial_weights_are_those_of_one_draw_a_layer(
    chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parameters, "_CHUNK", chunk)
    layers = {"linear": nn.Linear(21, 9), "convolution": nn.Conv2d(5, 8, 3), "small": nn.Linear(3, 2)}
    generator, other = seeded(), seeded()
    branches = make_parameters(layers, LoraSpec(4, 4.0), generator, CPU, dtype).layers
    for name, shape in {"linear": (4, 21), "convolution": (4, 5, 3, 3), "small": (2, 3)}.items():
        down = (torch.rand(shape, generator=other) * 2 - 1) * (1 / math.sqrt(math.prod(shape[1:])))
        assert torch.equal(branches[name].lora_down, down) and not branches[name].lora_up.any()
        assert torch.equal(branches[name].down.compute, down.to(dtype))
    assert torch.equal(generator.get_state(), other.get_state())  # what is drawn next stays the same too


def test_rank_pattern_overrides_the_rank_and_keeps_the_scale() -> None:
    layers = {name: nn.Linear(20, 30) for name in ("usual", "more", "less", "too much")}
    ranks = {"more": 12, "less": 1, "too much": 99}
    branches = make_parameters(layers, LoraSpec(4, 2.0, ranks), seeded(), CPU).layers
    assert {name: len(branch.lora_down) for name, branch in branches.items()} == {
        "usual": 4,
        "more": 12,
        "less": 1,
        "too much": 20,
    }
    assert {branch.scale for branch in branches.values()} == {0.5}
    assert branches["more"].lora_up.shape == (30, 12) and branches["more"].alpha == 6


def test_alpha_scales_multiply_the_scale() -> None:
    layers = {name: nn.Linear(20, 30) for name in ("network", "text")}
    branches = make_parameters(layers, LoraSpec(4, 2.0, {"text": 2}, {"text": 0.1}), seeded(), CPU).layers
    assert branches["network"].scale == 0.5 and branches["text"].scale == pytest.approx(0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_and_gradients_are_views_of_the_flat_tensors(dtype: torch.dtype) -> None:
    initial = {
        "linear": Layer(torch.randn(3, 7), torch.randn(5, 3), 3.0),
        "convolution": Layer(torch.randn(3, 6, 3, 3), torch.randn(4, 3, 1, 1), 3.0),
    }
    weights = FlatParameters(initial, CPU, dtype)
    assert (weights.compute is weights.master) == (dtype == torch.float32)
    for name, branch in weights.layers.items():
        assert torch.equal(branch.lora_down, initial[name].lora_down)
        for factor in (branch.down, branch.up):
            span = weights.span(factor.master)
            assert span.start % 64 == 0  # aligned for matrix products
            factor.compute.grad.fill_(2)
            assert (weights.gradient[span] == 2).all()
    assert weights.layers["convolution"].lora_down.is_contiguous(memory_format=torch.channels_last)


def test_loading_a_lower_rank_pads_with_zeros() -> None:
    weights = FlatParameters({"layer": Layer(torch.randn(4, 7), torch.randn(5, 4), 4.0)}, CPU)
    smaller = Layer(torch.randn(2, 7), torch.randn(5, 2), 6.0)  # scale 3
    weights.load({"layer": smaller})
    loaded = weights.to_layers()["layer"]
    delta = loaded.scale * loaded.lora_up @ loaded.lora_down
    torch.testing.assert_close(delta, smaller.scale * smaller.lora_up @ smaller.lora_down)
    assert not loaded.lora_down[2:].any() and not loaded.lora_up[:, 2:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_copies_have_the_shapes_of_the_weights_and_memory_of_their_own(dtype: torch.dtype) -> None:
    layers = {"linear": nn.Linear(6, 5), "convolution": nn.Conv2d(4, 5, 3)}
    weights = make_parameters(layers, LoraSpec(3, 1.5), seeded(), CPU)
    weights.master.normal_(generator=seeded(9))
    expected = {
        name: [factor.clone().to(dtype) for factor in (layer.lora_down, layer.lora_up)]
        for name, layer in weights.layers.items()
    }
    copies = weights.to_layers(dtype)
    weights.master.add_(1)
    for name, layer in copies.items():
        assert layer.lora_down.shape[1:] == layers[name].weight.shape[1:]
        assert layer.rank == 3 and layer.scale == weights.layers[name].scale == 0.5
        for factor, wanted in zip((layer.lora_down, layer.lora_up), expected[name], strict=True):
            assert torch.equal(factor, wanted) and factor.dtype == dtype
            assert factor.is_contiguous() and not factor.requires_grad
            assert factor.untyped_storage().nbytes() == factor.nbytes


@pytest.mark.parametrize("number", [1e5, math.inf, math.nan])
def test_a_copy_that_is_not_finite_is_refused(number: float) -> None:
    weights = make_parameters({"layer": nn.Linear(6, 5)}, LoraSpec(3, 1.5), seeded(), CPU)
    weights.layers["layer"].lora_up[1, 1] = number
    with pytest.raises(ValueError, match=r"too large for torch\.float16"):
        weights.to_layers(torch.float16)
    assert not torch.equal(weights.to_layers()["layer"].lora_up, torch.zeros(5, 3))
