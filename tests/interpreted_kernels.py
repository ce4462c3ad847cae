"""Our kernels against float64; test_kernels.py runs this file on the CPU, with Triton's interpreter."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime import interpreter

from aclora_core.kernels.branch import through_input, through_output
from aclora_core.kernels.geglu import geglu
from aclora_core.kernels.group_norm import group_norm

_patch = interpreter._patch_lang_tensor


def _with_index(tensor: Any, *more: Any) -> None:
    """Newer NumPys do not take an array of one number for a number, as the interpreter does where it counts a loop."""
    _patch(tensor, *more)
    tensor.__index__ = lambda self: self.handle.data.item()


interpreter._patch_lang_tensor = _with_index

# Of the largest value: a float16 has 11 bits, a bfloat16 has 8, of which the interpreter cuts off the rest unrounded.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-7}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compare(ours: Tensor, x: Tensor, expected: Tensor, exact: Tensor) -> None:
    """Outputs, and gradients with respect to x and exact, for one random gradient."""
    gradient = draw(*ours.shape, seed=9).to(ours.dtype)
    (of_x,) = torch.autograd.grad(ours, x, gradient)
    (of_exact,) = torch.autograd.grad(expected, exact, gradient.double())
    for found, right in ((ours, expected), (of_x, of_exact)):
        assert found.dtype == x.dtype and found.shape == right.shape
        error = (found.double() - right).abs().max() / right.abs().max()
        assert error <= TOLERANCE[x.dtype], error


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", [(1, 9, 2 * 260), (1, 2), (8, 2 * 256)], ids=str)
def test_the_gate_is_that_of_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    hidden = (3 * draw(*shape)).to(dtype).requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    value, gate = exact.chunk(2, dim=-1)
    compare(geglu(hidden), hidden, value * F.gelu(gate), exact)


def test_the_gate_of_rows_that_lie_apart() -> None:
    hidden = draw(4, 6, 20).transpose(0, 1).requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    value, gate = exact.chunk(2, dim=-1)
    compare(geglu(hidden), hidden, value * F.gelu(gate), exact)


def test_far_gates_are_open_or_shut() -> None:
    hidden = torch.tensor([[2.0, 2.0, 2.0, -60.0, 0.0, 60.0]]).requires_grad_()
    (gradient,) = torch.autograd.grad(geglu(hidden).sum(), hidden)
    torch.testing.assert_close(geglu(hidden).detach(), torch.tensor([[0.0, 0.0, 120.0]]))
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.0, 60.0, 0.0, 1.0, 2.0]]))


def picture(n: int, channels: int, height: int, width: int, dtype: torch.dtype, middle: float = 0.5) -> Tensor:
    """Channels last in memory, each channel with its own spread."""
    x = draw(n, channels, height, width) * torch.linspace(0.5, 3, channels)[:, None, None] + middle
    return x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


def normed(x: Tensor, groups: int, dtype: torch.dtype, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Ours; float64's, and the input that it came from."""
    weight, bias = (1 + draw(2, x.shape[1], seed=1) / 2).to(dtype)
    exact = x.detach().double().requires_grad_()
    expected = F.group_norm(exact, groups, weight.double(), bias.double(), 1e-5)
    ours = group_norm(x, groups, weight, bias, 1e-5, silu)
    assert ours.is_contiguous(memory_format=torch.channels_last) and not ours.is_contiguous()
    return ours, F.silu(expected) if silu else expected, exact


# The sizes are: one small tile; several tiles of pixels and channels that end within; groups of uneven size across the
# tiles; more sums of a group than are joined at once; one channel in a group.
SIZES = [(1, 4, 2, 3, 2), (2, 80, 9, 8, 4), (1, 90, 8, 16, 3), (1, 2112, 2, 9, 1), (1, 8, 3, 5, 8)]


@pytest.mark.parametrize("size, silu", [(size, number % 2 == 1) for number, size in enumerate(SIZES)], ids=str)
def test_the_norm_is_that_of_float64(size: tuple[int, int, int, int, int], silu: bool) -> None:
    x = picture(*size[:4], torch.float32)
    ours, expected, exact = normed(x, size[4], torch.float32, silu)
    compare(ours, x, expected, exact)


SHORT = [(torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize("dtype, of_weight", SHORT, ids=str)
def test_the_norm_of_short_types(dtype: torch.dtype, of_weight: torch.dtype) -> None:
    x = picture(2, 20, 9, 8, dtype)
    ours, expected, exact = normed(x, 2, of_weight, silu=True)
    compare(ours, x, expected, exact)


def test_a_large_mean_costs_no_digits_but_its_own() -> None:
    x = picture(1, 12, 16, 9, torch.float32, middle=1000.0)
    ours, expected, _ = normed(x, 3, torch.float32, silu=False)
    # One step of a float32 at 1000 is 6e-5; sums of squares that are subtracted would be wrong by a tenth.
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=4e-4)


def test_a_constant_picture_is_its_bias() -> None:
    x = torch.full((1, 4, 3, 3), 7.0).contiguous(memory_format=torch.channels_last)
    found = group_norm(x, 2, torch.ones(4), torch.arange(4.0), 1e-5)
    torch.testing.assert_close(found, torch.arange(4.0)[:, None, None].expand(1, 4, 3, 3), rtol=0, atol=1e-6)


def test_a_gradient_of_another_layout_is_taken() -> None:
    x = picture(1, 6, 4, 5, torch.float32)
    ours, _, _ = normed(x, 2, torch.float32, silu=False)
    gradient = draw(1, 6, 4, 5)
    (first,) = torch.autograd.grad(ours, x, gradient, retain_graph=True)
    (last,) = torch.autograd.grad(ours, x, gradient.contiguous(memory_format=torch.channels_last), retain_graph=True)
    assert torch.equal(first, last)
    (even,) = torch.autograd.grad(ours.sum(), x)  # one number, expanded
    assert math.isfinite(even.sum())


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    x = picture(1, 6, 4, 5, torch.float32)
    with torch.no_grad():
        assert group_norm(x, 2, torch.ones(6), torch.zeros(6), 1e-5).grad_fn is None
        assert geglu(draw(2, 6).requires_grad_()).grad_fn is None


# Rows, inputs, outputs and rank: one small tile; several that end within; one row; rows that are summed up in parts.
BRANCHES = [(5, 3, 4, 2), (70, 150, 90, 16), (1, 40, 33, 5), (300, 65, 20, 20)]


@pytest.mark.parametrize("size", BRANCHES, ids=str)
@pytest.mark.parametrize("wanted", [True, False])
def test_a_branchs_way_back_is_that_of_float64(size: tuple[int, int, int, int], wanted: bool) -> None:
    """All gradients are added to what is there, and rows may lie apart. The interpreter has no products of bfloat16."""
    (rows, inputs, outputs, rank), dtype = size, torch.float16
    x, gradient = (draw(rows, width + 8, seed=width).to(dtype)[:, :width] for width in (inputs, outputs))
    inner, up, of_up = draw(rows, rank).to(dtype), draw(outputs, rank).to(dtype), draw(outputs, rank, seed=3).to(dtype)
    down, of_down, of_input = (draw(n, inputs, seed=n).to(dtype) for n in (rank, rank, rows))
    before = of_up.double(), of_down.double(), of_input.double()
    through = through_output(gradient, inner, up, of_up, 0.5)
    through_input(of_input if wanted else None, x, through, down, of_down, 0.5)
    pairs = [
        (through, gradient.double() @ up.double()),
        (of_up, before[0] + 0.5 * gradient.double().t() @ inner.double()),
        (of_down, before[1] + 0.5 * through.double().t() @ x.double()),
        (of_input, before[2] + 0.5 * through.double() @ down.double() if wanted else before[2]),
    ]
    for found, right in pairs:
        assert found.dtype == dtype
        error = (found.double() - right).abs().max() / right.abs().max()
        assert error <= TOLERANCE[dtype], error
