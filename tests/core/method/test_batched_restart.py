"""The batched restart that training uses, held to the plain one of ac_lora.py bit for bit.

Both compute in float64, from an SVD or from a Gram matrix, and so differ near 1e-16. In one weight of some 3 million a
boundary of float32 rounding lies between them, so one weight of a matrix may differ, by its last bit.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from aclora_core.method import ac_lora, batched_eigh, restart
from aclora_core.method.ac_lora import dynamic_threshold, restart_layer, restart_matrix, signal_count
from aclora_core.method.restart import restart_adapter
from aclora_core.method.thresholds import Measure, signal_counts
from tests.support import reference

KINDS = ("random", "falling", "steep", "low rank", "zero")
TIED_KINDS = ("identity", "two values")
SHAPES = ("wide", "tall", "convolution")
SINGLE_PRECISION_OR_LESS = (torch.float32, torch.bfloat16, torch.float16)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def integer(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def make_matrix(kind: str, rank: int, width: int, generator: torch.Generator) -> Tensor:
    """A matrix (rank, width) in float64."""
    matrix = torch.randn(rank, width, generator=generator, dtype=torch.float64)
    index = torch.arange(rank, dtype=torch.float64)[:, None]
    if kind == "falling":
        return matrix * torch.exp(-0.5 * index)
    if kind == "steep":
        return matrix * torch.exp(-4.0 * index)
    if kind == "low rank":
        matrix[2:] = matrix[:1]
    elif kind == "zero":
        matrix.zero_()
    elif kind == "identity":
        return torch.eye(rank, width, dtype=torch.float64)
    elif kind == "two values":
        side = max(rank, width)
        orthogonal = torch.linalg.qr(torch.randn(side, side, generator=generator, dtype=torch.float64)).Q
        matrix = orthogonal[:rank, :width].contiguous()
        matrix[: rank // 2] *= 3.0
    return matrix


def make_layer(kind: str, shape: str, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random factors. In the shape "tall" the rank exceeds the width of lora_down, of lora_up or of both."""
    rank = integer(1, 40, generator)
    least = 1 if shape == "tall" else rank
    outputs = integer(least, least + 90, generator)
    if shape == "convolution":
        inputs = -(-rank // 9) + integer(0, 6, generator)
        down = make_matrix(kind, rank, inputs * 9, generator).view(rank, inputs, 3, 3)
        up = make_matrix(kind, rank, outputs, generator).mT.reshape(outputs, rank, 1, 1)
    else:
        down = make_matrix(kind, rank, integer(least, least + 90, generator), generator)
        up = make_matrix(kind, rank, outputs, generator).mT.contiguous()
    return down.to(dtype), up.to(dtype)


def cases(kind: str, shape: str, dtype: torch.dtype, count: int) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Layers, each with a threshold."""
    generator = seeded(1000 * (KINDS + TIED_KINDS).index(kind) + SHAPES.index(shape))
    for _ in range(count):
        yield *make_layer(kind, shape, dtype, generator), float(torch.rand((), generator=generator))


def is_same_but_for_one_rounding(new: Tensor, expected: Tensor) -> bool:
    """Whether all weights are equal bit for bit, but at most one, which agrees within rounding."""
    differs = new != expected
    error = (new[differs].double() - expected[differs].double()).abs()
    step = torch.finfo(new.dtype).eps * expected[differs].double().abs() + 1e-14 * float(expected.abs().max())
    return int(differs.sum()) <= 1 and bool((error <= step).all())


@pytest.mark.parametrize("measure", get_args(Measure))
@pytest.mark.parametrize("dtype", SINGLE_PRECISION_OR_LESS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_each_factor_equals_restart_matrix(kind: str, shape: str, dtype: torch.dtype, measure: Measure) -> None:
    for down, up, threshold in cases(kind, shape, dtype, 25):
        generator = seeded(5)
        expected_down, kept_down = restart_matrix(down, threshold, generator, measure)
        expected_up, kept_up = restart_matrix(up.flatten(1).mT, threshold, generator, measure)
        result = restart_adapter({"layer": (down, up, 1.0)}, threshold, seeded(5), "paper", measure)["layer"]
        assert (result.rank.kept_down, result.rank.kept_up) == (kept_down, kept_up)
        assert is_same_but_for_one_rounding(down, expected_down)
        assert is_same_but_for_one_rounding(up.flatten(1).mT, expected_up)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_equals_restart_layer(kind: str, shape: str) -> None:
    for down, up, loss in cases(kind, shape, torch.float32, 10):
        expected = restart_layer(down, up, loss, 3, 20, seeded(5))
        threshold = dynamic_threshold(loss, 3, 20)
        restart_adapter({"layer": (down, up, 1.0)}, threshold, seeded(5))
        for factor, new in zip((down, up), expected, strict=True):
            assert is_same_but_for_one_rounding(factor, new) and new.shape == factor.shape and new.is_contiguous()


@pytest.mark.parametrize("dtype", SINGLE_PRECISION_OR_LESS)
def test_equal_singular_values_on_one_side_of_the_split_are_no_exception(dtype: torch.dtype) -> None:
    generator = seeded(4)
    for _ in range(25):
        large, small = integer(1, 12, generator), integer(1, 12, generator)
        matrix = make_matrix("random", large + small, 60, generator)
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        values = torch.tensor([3.0] * large + [1.0] * small, dtype=torch.float64)
        down = ((u * values) @ vh).to(dtype)
        energy = 9.0 * large + small
        threshold = (9.0 * large + 0.5) / energy  # between the shares of the last large and the first small value
        expected, kept = restart_matrix(down, threshold, seeded(5))
        result = restart_adapter({"layer": (down, torch.ones(7, len(down)).to(dtype), 1.0)}, threshold, seeded(5))
        assert result["layer"].rank.kept_down == kept == large
        assert is_same_but_for_one_rounding(down, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", TIED_KINDS)
def test_a_split_between_equal_singular_values_keeps_as_many_and_as_much(
    kind: str, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding decides which of them is signal, and even the alignment of the matrix in memory can change it."""
    for module in (ac_lora, restart):
        monkeypatch.setattr(module, "standard_normal", lambda like, _: torch.zeros_like(like))
    for down, up, threshold in cases(kind, shape, torch.float64, 25):
        old = down.flatten(1).clone()
        plain, kept = restart_matrix(down, threshold, seeded(5))
        result = restart_adapter({"layer": (down, up, 1.0)}, threshold, seeded(5))["layer"]
        assert result.rank.kept_down == kept
        values = reference.singular_values(old.numpy())
        for signal in (plain.flatten(1), down.flatten(1)):
            energy = float(signal.square().sum())
            assert energy == pytest.approx(float((values[:kept] ** 2).sum()), rel=1e-9)
            assert float((signal * old).sum()) == pytest.approx(energy, rel=1e-9)
            assert int(torch.linalg.matrix_rank(signal, rtol=1e-9)) == kept


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_float64_weights_agree_within_rounding(kind: str, shape: str) -> None:
    for down, up, threshold in cases(kind, shape, torch.float64, 10):
        generator = seeded(5)
        expected = [restart_matrix(matrix, threshold, generator)[0] for matrix in (down, up.flatten(1).mT)]
        restart_adapter({"layer": (down, up, 1.0)}, threshold, seeded(5))
        for new, plain in zip((down, up.flatten(1).mT), expected, strict=True):
            torch.testing.assert_close(new, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_many_layers_at_once_equal_restart_matrix_of_each(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise is drawn for a whole stack at a time, so each plain restart is given its part of it."""
    rank, inputs, outputs, count = 12, 40, 30, 17
    generator = seeded(3)
    layers = {}
    for number in range(count):
        down = make_matrix(kind, rank, inputs, generator).float()
        up = make_matrix(kind, rank, outputs, generator).float().mT.contiguous()
        layers[str(number)] = down, up, 1.0
    noise = [torch.randn(count, rank, width, generator=generator) for width in (inputs, outputs)]

    def draw_stack(like: Tensor, generator: torch.Generator) -> Tensor:
        return noise[0 if like.shape[-1] == inputs else 1].to(like)

    expected = []
    for number, (down, up, _) in enumerate(layers.values()):
        for matrix, drawn in zip((down, up.mT), noise, strict=True):
            monkeypatch.setattr(ac_lora, "standard_normal", lambda like, _, part=drawn[number]: part.to(like))
            expected.append(restart_matrix(matrix, 0.6, generator)[0])
    monkeypatch.setattr(restart, "standard_normal", draw_stack)
    restart_adapter(layers, 0.6, generator)
    found = [matrix for down, up, _ in layers.values() for matrix in (down, up.mT)]
    assert all(is_same_but_for_one_rounding(new, plain) for new, plain in zip(found, expected, strict=True))


@pytest.mark.parametrize("measure", get_args(Measure))
def test_a_batch_of_spectra_has_the_signal_counts_of_each(measure: Measure) -> None:
    generator = seeded(9)
    for size in (1, 2, 3, 8, 16, 64):
        spectra = torch.rand(60, size, generator=generator, dtype=torch.float64).sort(-1, descending=True).values
        spectra[::7] = 1.0
        spectra[::11] = 0.0
        spectra[::13, size // 2 :] = 0.0
        for threshold in (0.0, 0.25, 0.5, 0.75, 0.9, 1.0):
            counts = signal_counts(spectra, size, size, threshold, measure).tolist()
            assert counts == [signal_count(values, threshold, measure) for values in spectra]


def stack_of_layers() -> dict[str, tuple[Tensor, Tensor, float]]:
    generator = seeded(3)
    layers = {}
    for number, kind in enumerate(("random", "steep", "zero", "low rank")):
        down = make_matrix(kind, 9, 40, generator).float()
        layers[str(number)] = down, make_matrix(kind, 9, 30, generator).float().mT.contiguous(), 1.0
    return layers


def test_block_jacobi_of_a_gpu_restarts_to_the_same_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, others = stack_of_layers(), stack_of_layers()
    expected = restart_adapter(layers, 0.7, seeded(0))
    monkeypatch.setattr(batched_eigh, "_uses_block_jacobi", lambda matrices: True)
    found = restart_adapter(others, 0.7, seeded(0))
    for name, result in found.items():
        assert replace(result.rank, jump=0.0, energy=0.0) == replace(expected[name].rank, jump=0.0, energy=0.0)
        for factor, other in zip(layers[name][:2], others[name][:2], strict=True):
            torch.testing.assert_close(factor, other, rtol=1e-5, atol=1e-6)


def test_the_noise_floor_keeps_a_planted_signal_and_drops_pure_noise() -> None:
    generator = seeded(4)
    noise, left, right = (torch.randn(*shape, generator=generator) for shape in ((32, 512), (32, 2), (2, 512)))
    factors = {"noise": noise, "planted": noise + 4.0 * left @ right}
    layers = {name: (factor, torch.zeros(20, 32), 1.0) for name, factor in factors.items()}
    results = restart_adapter(layers, "noise floor", seeded(0))
    assert [result.rank.kept_down for result in results.values()] == [1, 2]
