"""The fused kernels against float64; test_kernels.py runs this file on the CPU, with Triton's interpreter."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime import interpreter

from aclora_core.acceleration.kernels import Kernels, _tiles, lora_conv_gradients, lora_linear_gradients, self_test
from aclora_core.acceleration.kernels import modulate as modulate_module
from aclora_core.acceleration.kernels import short_key_attention as attention_module
from aclora_core.acceleration.kernels.adamw import adamw
from aclora_core.acceleration.kernels.geglu import geglu
from aclora_core.acceleration.kernels.gelu import gelu
from aclora_core.acceleration.kernels.group_norm import group_norm
from aclora_core.acceleration.kernels.kernel import ConvParams
from aclora_core.acceleration.kernels.layer_norm import layer_norm
from aclora_core.acceleration.kernels.lora_conv import lora_conv
from aclora_core.acceleration.kernels.lora_linear import lora_linear
from aclora_core.acceleration.kernels.lora_linear_backward import lora_linear_backward
from aclora_core.acceleration.kernels.modulate import modulate
from aclora_core.acceleration.kernels.residual_norm import residual_norm
from aclora_core.acceleration.kernels.rms_norm import rms_norm
from aclora_core.acceleration.kernels.rope import rope
from aclora_core.acceleration.kernels.short_key_attention import short_key_attention

_patch = interpreter._patch_lang_tensor


def _with_index(tensor: Any, *more: Any) -> None:
    """Newer NumPys do not convert an array of one element to an integer, as the interpreter does in its loops."""
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
def test_geglu_equals_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    hidden = (3 * draw(*shape)).to(dtype).requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    value, gate = exact.chunk(2, dim=-1)
    compare(geglu(hidden), hidden, value * F.gelu(gate), exact)


def test_geglu_of_strided_rows_equals_float64() -> None:
    hidden = draw(4, 6, 20).transpose(0, 1).requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    value, gate = exact.chunk(2, dim=-1)
    compare(geglu(hidden), hidden, value * F.gelu(gate), exact)


def test_geglu_saturates_for_large_gates() -> None:
    hidden = torch.tensor([[2.0, 2.0, 2.0, -60.0, 0.0, 60.0]]).requires_grad_()
    (gradient,) = torch.autograd.grad(geglu(hidden).sum(), hidden)
    torch.testing.assert_close(geglu(hidden).detach(), torch.tensor([[0.0, 0.0, 120.0]]))
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.0, 60.0, 0.0, 1.0, 2.0]]))


def image(n: int, channels: int, height: int, width: int, dtype: torch.dtype, mean: float = 0.5) -> Tensor:
    """Channels last in memory, each channel with its own standard deviation."""
    x = draw(n, channels, height, width) * torch.linspace(0.5, 3, channels)[:, None, None] + mean
    return x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_group_norm_with_a_shift_equals_float64(dtype: torch.dtype, silu: bool) -> None:
    """Several partly filled tiles, two images with different shifts."""
    x, shift = image(2, 80, 9, 8, dtype), (3 * draw(2, 80, seed=2)).to(dtype).requires_grad_()
    weight, bias = (1 + draw(2, 80, seed=1) / 2).to(dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, shift)]
    expected = F.group_norm(exact[0] + exact[1][:, :, None, None], 4, weight.double(), bias.double(), 1e-5)
    expected = F.silu(expected) if silu else expected
    ours = group_norm(x, 4, weight, bias, 1e-5, silu, shift)
    gradient = draw(*ours.shape, seed=9).to(dtype)
    pairs = [(ours, expected)]
    gradients = torch.autograd.grad(ours, (x, shift), gradient), torch.autograd.grad(expected, exact, gradient.double())
    for found, right in (*pairs, *zip(*gradients, strict=True)):
        error = (found.double() - right).abs().max() / right.abs().max()
        assert found.dtype == dtype and error <= TOLERANCE[dtype] * 4, error  # a sum of 72 that nearly cancel


# Rows and their width: a partly filled program, a width that fills its tile, a single element.
ROWS = [((3, 5, 90), torch.float32), ((9, 256), torch.float16), ((5, 2), torch.bfloat16), ((1, 1), torch.float32)]


@pytest.mark.parametrize("shape, dtype", ROWS, ids=str)
def test_layer_norm_equals_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (draw(*shape) * 3 + 1).to(dtype).requires_grad_()
    weight, bias = (1 + draw(2, shape[-1], seed=1) / 2).to(dtype)
    exact = x.detach().double().requires_grad_()
    expected = F.layer_norm(exact, shape[-1:], weight.double(), bias.double())
    ours = layer_norm(x, weight, bias, 1e-5)
    if shape[-1] > 2:
        compare(ours, x, expected, exact)
    else:  # where a row has almost no variance, the gradient is what is left of numbers that cancel
        torch.testing.assert_close(ours.double(), expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("used", ["both", "sum", "norm"])
@pytest.mark.parametrize("with_sum", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_residual_norm_equals_float64(dtype: torch.dtype, with_sum: bool, used: str) -> None:
    """With gradients of both outputs, and of one of them."""
    given = [(draw(7, 90, seed=seed) + 1).to(dtype).requires_grad_() for seed in range(1 + with_sum)]
    weight, bias = (1 + draw(2, 90, seed=1) / 2).to(dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    right = sum(exact).clone()
    pairs = [
        *zip(
            residual_norm(given[0], given[1] if with_sum else None, weight, bias, 1e-5),
            (right, F.layer_norm(right, (90,), weight.double(), bias.double())),
            strict=True,
        )
    ]
    pairs = {"both": pairs, "sum": pairs[:1], "norm": pairs[1:]}[used]
    gradients = [draw(7, 90, seed=8 + number).to(dtype) for number in range(len(pairs))]
    found = torch.autograd.grad([ours for ours, _ in pairs], given, gradients)
    wanted = torch.autograd.grad([it for _, it in pairs], exact, [gradient.double() for gradient in gradients])
    for ours, expected in (*pairs, *zip(found, wanted, strict=True)):
        error = (ours.double() - expected).abs().max() / expected.abs().max()
        assert ours.dtype == dtype and error <= 2 * TOLERANCE[dtype], error  # the sum is rounded too


def normed(x: Tensor, groups: int, dtype: torch.dtype, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's result; that in float64, and its input."""
    weight, bias = (1 + draw(2, x.shape[1], seed=1) / 2).to(dtype)
    exact = x.detach().double().requires_grad_()
    expected = F.group_norm(exact, groups, weight.double(), bias.double(), 1e-5)
    ours = group_norm(x, groups, weight, bias, 1e-5, silu)
    assert ours.is_contiguous(memory_format=torch.channels_last) and not ours.is_contiguous()
    return ours, F.silu(expected) if silu else expected, exact


# One small tile; several partly filled tiles of pixels and channels; groups that do not align with tiles; more sums of
# a group than are added up at once; one channel in a group.
SIZES = [(1, 4, 2, 3, 2), (2, 80, 9, 8, 4), (1, 90, 8, 16, 3), (1, 2112, 2, 9, 1), (1, 8, 3, 5, 8)]


@pytest.mark.parametrize("size, silu", [(size, number % 2 == 1) for number, size in enumerate(SIZES)], ids=str)
def test_group_norm_equals_float64(size: tuple[int, int, int, int, int], silu: bool) -> None:
    x = image(*size[:4], torch.float32)
    ours, expected, exact = normed(x, size[4], torch.float32, silu)
    compare(ours, x, expected, exact)


HALF = [(torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize("dtype, of_weight", HALF, ids=str)
def test_group_norm_in_half_precision_equals_float64(dtype: torch.dtype, of_weight: torch.dtype) -> None:
    x = image(2, 20, 9, 8, dtype)
    ours, expected, exact = normed(x, 2, of_weight, silu=True)
    compare(ours, x, expected, exact)


def test_group_norm_is_accurate_for_a_large_mean() -> None:
    x = image(1, 12, 16, 9, torch.float32, mean=1000.0)
    ours, expected, _ = normed(x, 3, torch.float32, silu=False)
    # One step of a float32 at 1000 is 6e-5; sums of squares that are subtracted would be wrong by a tenth.
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=4e-4)


def test_group_norm_of_a_constant_image_is_its_bias() -> None:
    x = torch.full((1, 4, 3, 3), 7.0).contiguous(memory_format=torch.channels_last)
    found = group_norm(x, 2, torch.ones(4), torch.arange(4.0), 1e-5)
    torch.testing.assert_close(found, torch.arange(4.0)[:, None, None].expand(1, 4, 3, 3), rtol=0, atol=1e-6)


def test_group_norm_takes_gradients_in_any_memory_format() -> None:
    x = image(1, 6, 4, 5, torch.float32)
    ours, _, _ = normed(x, 2, torch.float32, silu=False)
    gradient = draw(1, 6, 4, 5)
    (first,) = torch.autograd.grad(ours, x, gradient, retain_graph=True)
    (last,) = torch.autograd.grad(ours, x, gradient.contiguous(memory_format=torch.channels_last), retain_graph=True)
    assert torch.equal(first, last)
    (even,) = torch.autograd.grad(ours.sum(), x)  # one number, expanded
    assert math.isfinite(even.sum())


def test_nothing_is_saved_without_gradients() -> None:
    x = image(1, 6, 4, 5, torch.float32)
    with torch.no_grad():
        assert group_norm(x, 2, torch.ones(6), torch.zeros(6), 1e-5).grad_fn is None
        assert geglu(draw(2, 6).requires_grad_()).grad_fn is None


# Rows, inputs, outputs, rank and layers: one small tile; partly filled tiles of every size; one row; split sums over
# rows.
LINEARS = [(5, 64, 64, 2, 1), (70, 128, 192, 16, 3), (1, 64, 128, 5, 2), (300, 192, 64, 20, 1)]


class Linears:
    """Linear layers with their branches, in float16: the interpreter has no matrix products of bfloat16."""

    def __init__(self, rows: int, inputs: int, outputs: int, rank: int, count: int) -> None:
        def some(*shape: int) -> list[Tensor]:
            return [(draw(*shape, seed=number) / shape[-1] ** 0.5).half() for number in range(count)]

        self.x = draw(rows, inputs + 8).half()[:, :inputs]  # strided rows
        self.weights, self.biases = some(outputs, inputs), some(1, outputs)
        self.downs, self.ups = some(rank, inputs), some(outputs, rank)
        self.gradients = [draw(rows, outputs + 8, seed=5 + number).half()[:, :outputs] for number in range(count)]
        self.rank, self.outputs, self.inputs = rank, outputs, inputs


def close(found: Tensor, right: Tensor, roundings: int = 1) -> None:
    assert found.dtype == torch.float16 and found.shape == right.shape
    error = (found.double() - right).abs().max() / right.abs().max()
    assert error <= roundings * TOLERANCE[found.dtype], error


@pytest.mark.parametrize("size", LINEARS, ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_lora_linear_equals_float64(size: tuple[int, int, int, int, int], biased: bool) -> None:
    it = Linears(*size)
    x = it.x.double()
    output, x_down = lora_linear(it.x, it.weights, it.biases if biased else [], it.downs, it.ups, 0.5)
    for number, (weight, bias, down, up) in enumerate(zip(it.weights, it.biases, it.downs, it.ups, strict=True)):
        h = x @ down.double().t()
        right = x @ weight.double().t() + 0.5 * h @ up.double().t() + (bias.double() if biased else 0)
        close(x_down[number], h)
        close(output[number], right)


@pytest.mark.parametrize("size", LINEARS, ids=str)
def test_lora_linear_backward_equals_float64(size: tuple[int, int, int, int, int]) -> None:
    it = Linears(*size)
    grad_input, grad_up = lora_linear_backward(it.gradients, it.weights, it.downs, it.ups, 0.5)
    right = torch.zeros(grad_input.shape, dtype=torch.float64)
    for number, (gradient, weight, down, up) in enumerate(zip(it.gradients, it.weights, it.downs, it.ups, strict=True)):
        h = gradient.double() @ up.double()
        close(grad_up[number], h)
        right += gradient.double() @ weight.double() + 0.5 * h @ down.double()
    close(grad_input, right)


@pytest.fixture(params=[512, 20])
def min_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Rows that a program sums at least: for the small examples here all, or a part of them."""
    monkeypatch.setattr(_tiles, "_MIN_ROWS_PER_SPLIT", request.param)
    monkeypatch.setattr(_tiles, "_MIN_SPLIT_ROWS", 2 * request.param)
    for module in (lora_linear_gradients, lora_conv_gradients):
        monkeypatch.setattr(module, "_BLOCK_K", min(128, request.param // 16 * 16))
    return int(request.param)


def test_long_sums_are_split(min_rows: int) -> None:
    plan = _tiles.plan_split_k(70, 5, lora_linear_gradients._BLOCK_K, 64, torch.device("cpu"))
    assert plan.splits == {512: 1, 20: 3}[min_rows]
    assert (plan.splits - 1) * plan.rows_per_split < 70 <= plan.splits * plan.rows_per_split
    assert plan.arrived.count_nonzero() == 0  # also after the sums of other tests


# The last: inputs and outputs that are no multiples of a block, which only this kernel takes.
@pytest.mark.parametrize("size", [*LINEARS, (70, 150, 90, 16, 2)], ids=str)
@pytest.mark.parametrize("wanted", [True, False])
def test_lora_linear_gradients_equal_float64(size: tuple[int, int, int, int, int], wanted: bool, min_rows: int) -> None:
    """They are added to the gradients so far."""
    it, rows, count = Linears(*size), size[0], size[4]
    x_down, grad_up = draw(count, rows, it.rank).half(), draw(count, rows, it.rank, seed=1).half()
    down_grads, up_grads = ([tensor.clone() for tensor in factors] for factors in (it.downs, it.ups))
    grad_input = draw(rows, it.inputs, seed=2).half()
    before, alone = grad_input.double(), wanted and count == 1
    more = (grad_input, it.downs[0]) if alone else ()
    lora_linear_gradients.lora_linear_gradients(it.x, it.gradients, x_down, grad_up, down_grads, up_grads, 0.5, *more)
    for number in range(count):
        close(down_grads[number], it.downs[number].double() + 0.5 * grad_up[number].double().t() @ it.x.double())
        of_up = 0.5 * it.gradients[number].double().t() @ x_down[number].double()
        close(up_grads[number], it.ups[number].double() + of_up)
    close(grad_input, before + 0.5 * grad_up[0].double() @ it.downs[0].double() if alone else before)


# Images, heads, queries, keys and channels: partly filled tiles; one query and one key; as many as there may be.
ATTENTIONS = [(2, 2, 130, 21, 40), (1, 2, 1, 1, 64), (1, 1, 65, 128, 128)]


@pytest.mark.parametrize("size", ATTENTIONS, ids=str)
@pytest.mark.parametrize("processors", [1, 99])  # so that a program has all tiles of a head, or one
def test_short_key_attention_equals_float64(
    size: tuple[int, int, int, int, int], processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_module, "_multiprocessors", lambda device: processors)
    n, heads, queries, keys, channels = size
    drawn = [draw(n, rows, heads, channels, seed=rows).half().transpose(1, 2) for rows in (queries, keys, keys + 1)]
    given = [drawn[0].requires_grad_(), drawn[1].requires_grad_(), drawn[2][:, :, :keys].detach().requires_grad_()]
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    ours, expected = short_key_attention(*given, 0.3), F.scaled_dot_product_attention(*exact, scale=0.3)
    gradient = draw(n, heads, queries, channels, seed=9).half()
    pairs = [(ours, expected)]
    gradients = torch.autograd.grad(ours, given, gradient)
    pairs += zip(gradients, torch.autograd.grad(expected, exact, gradient.double()), strict=True)
    for found, right in pairs:
        assert found.shape == right.shape and found.dtype == torch.float16
        error = (found.double() - right).abs().max() / right.abs().max().clamp_min(0.1)
        assert error <= 2 * TOLERANCE[torch.float16], error  # weights are rounded too
    assert ours.transpose(1, 2).is_contiguous()


# Images, inputs, height, width, outputs, rank, kernel, stride, padding and dilation: a split sum and partly filled
# tiles; stride 2; a 1x1 kernel; dilation; no padding; one channel.
CONVOLUTIONS = [
    (2, 70, 5, 7, 20, 5, (3, 3), (1, 1), (1, 1), (1, 1)),
    (1, 8, 9, 8, 6, 20, (3, 3), (2, 2), (1, 1), (1, 1)),
    (1, 16, 7, 6, 5, 3, (1, 1), (2, 2), (0, 0), (1, 1)),
    (1, 5, 9, 9, 4, 2, (3, 2), (1, 2), (2, 0), (2, 3)),
    (1, 1, 12, 13, 130, 16, (3, 3), (1, 1), (0, 0), (1, 1)),
]


@pytest.mark.parametrize("size", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("wanted", [True, False])
def test_lora_conv_and_its_gradients_equal_float64(size: tuple, wanted: bool, min_rows: int) -> None:
    """All results are added to what is there."""
    n, inputs, height, width, outputs, rank, kernel, *steps = size
    last, scale = torch.channels_last, 0.5
    x = draw(n, inputs, height, width).half().contiguous(memory_format=last)
    down, up = draw(rank, inputs, *kernel, seed=1).half(), draw(outputs, rank, seed=2).half()
    exact = [tensor.double().requires_grad_() for tensor in (x, down, up)]
    h = F.conv2d(exact[0], exact[1], None, *steps)
    result = scale * F.conv2d(h, exact[2][:, :, None, None])
    output = draw(*result.shape, seed=3).half().contiguous(memory_format=last)
    before, turned = output.double(), down.contiguous(memory_format=last)
    bias = draw(outputs, seed=6).half() if wanted else None
    x_down = lora_conv(output, bias, x, turned, up, ConvParams(*steps), scale)
    close(x_down, h.detach().permute(0, 2, 3, 1).reshape(-1, rank))
    added = result.detach() if bias is None else result.detach() + bias.double()[:, None, None]
    close(output, before + added, roundings=2)  # x_down is rounded too

    gradient = draw(*result.shape, seed=4).half().contiguous(memory_format=last)
    grad_up = (gradient.permute(0, 2, 3, 1).reshape(-1, outputs) @ up).contiguous()
    grown = [draw(*tensor.shape, seed=5).half() for tensor in (x, down, up)]
    grown[:2] = [tensor.contiguous(memory_format=last) for tensor in grown[:2]]
    expected = torch.autograd.grad(result, exact, gradient.double())
    right = [tensor.double() + added for tensor, added in zip(grown, expected, strict=True)]
    if not wanted:
        right[0] = grown[0].double()
    lora_conv_gradients.lora_conv_gradients(
        x,
        gradient,
        x_down,
        grad_up,
        turned,
        grown[1],
        grown[2],
        grown[0] if wanted else None,
        ConvParams(*steps),
        scale,
    )
    for found, exactly in zip(grown, right, strict=True):
        error = (found.double() - exactly).abs().max() / exactly.abs().max()
        assert error <= 2 * TOLERANCE[torch.float16], error  # x_down and grad_up are rounded too


@pytest.mark.parametrize("tiles, heads, processors", [(8, 20, 132), (32, 10, 132), (8, 80, 132), (1, 1, 9), (5, 7, 1)])
def test_all_tiles_of_queries_are_split(tiles: int, heads: int, processors: int) -> None:
    each, parts = attention_module._split_queries(tiles, heads, processors)
    assert each * parts >= tiles and each * (parts - 1) < tiles
    waves = -(-heads * parts // processors)
    assert waves * (each + 1) <= -(-heads // processors) * (tiles + 1)  # no worse than a head for each program


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_adamw_equals_torch(dtype: torch.dtype) -> None:
    """With a changing learning rate, a divisor, and a skipped step in between."""
    count, decay = 2000, 0.05
    weights, before, copy = draw(count), torch.zeros(count), torch.zeros(count, dtype=torch.float16)
    exact = torch.nn.Parameter(weights.clone())
    optimizer = torch.optim.AdamW([exact], lr=0.0, weight_decay=decay)
    exp_avg, exp_avg_sq, steps = torch.zeros(count), torch.zeros(count), torch.zeros(())
    for number, rate in enumerate((0.1, 0.02, 0.3)):
        for skipped in (1.0, 0.0):
            gradient = draw(count, seed=3 + number).to(dtype)
            grad, start, steps = gradient.float() / 4, weights.clone(), steps + 1 - skipped
            numbers = steps, torch.tensor(rate), torch.tensor(4.0), torch.tensor(skipped)
            unchanged = [tensor.clone() for tensor in (weights, exp_avg, exp_avg_sq, before, copy)]
            adamw(weights, gradient, exp_avg, exp_avg_sq, before, copy, *numbers, (0.9, 0.999), decay, 1e-8)
            assert not gradient.any()
            if skipped:
                assert all(map(torch.equal, unchanged, (weights, exp_avg, exp_avg_sq, before, copy)))
        optimizer.param_groups[0]["lr"], exact.grad = rate, grad
        optimizer.step()
        assert torch.equal(before, start)
        torch.testing.assert_close(weights, exact.detach(), rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(copy, exact.detach().half(), rtol=2e-3, atol=2e-3)


def strided_heads(*shape: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Heads (n, heads, rows, d) that are parts of wider rows, as in attention; and a copy in float64."""
    n, heads, rows, width = shape
    wide = (2 * draw(n, rows, 3, heads, width, seed=seed)).to(dtype)
    x = wide.permute(2, 0, 3, 1, 4)[1].requires_grad_()
    return x, x.detach().double().requires_grad_()


# Heads: a partly filled program, a width that does not fill its tile, a single row.
HEADS = [((2, 3, 21, 64), torch.float32), ((1, 2, 9, 24), torch.float16), ((1, 1, 1, 2), torch.bfloat16)]


@pytest.mark.parametrize("shape, dtype", HEADS, ids=str)
def test_rms_norm_of_heads_equals_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, exact = strided_heads(*shape, dtype=dtype)
    weight = (1 + draw(shape[-1], seed=1) / 2).to(dtype)
    ours = rms_norm(x, weight, 1e-3)
    compare(ours, x, F.rms_norm(exact, shape[-1:], weight.double(), 1e-3), exact)
    if x.numel() > 2:
        assert ours.stride() == torch.empty_like(x).stride()  # so that the heads of a row stay side by side


@pytest.mark.parametrize("places", [(1, 1, 21), (2, 1, 21), (1, 3, 21)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rope_equals_float64(places: tuple[int, ...], dtype: torch.dtype) -> None:
    """With any matrices, one for each position or for all."""
    x, exact = strided_heads(2, 3, 21, 48, dtype=dtype)
    table = draw(*places, 24, 2, 2, seed=1)
    ours, pairs = rope(x, table), exact.unflatten(-1, (24, 1, 2))
    compare(ours, x, (pairs * table.double()).sum(-1).flatten(-2), exact)
    assert ours.stride() == torch.empty_like(x).stride()


# A row of its own for each head, as a table of all three axes; heads that fill several tiles; one head for each token.
ROPE_TABLES = [((2, 3, 21), (2, 3, 21)), ((1, 19, 5), (1, 1, 5)), ((2, 19, 3), (2, 1, 1)), ((3, 1, 4), (1, 1, 4))]


@pytest.mark.parametrize("places, of_table", ROPE_TABLES, ids=str)
def test_rope_shares_matrices_as_the_table_does(places: tuple[int, ...], of_table: tuple[int, ...]) -> None:
    x = draw(*places, 48).requires_grad_()
    table, exact = draw(*of_table, 24, 2, 2, seed=1), x.detach().double().requires_grad_()
    right = (exact.unflatten(-1, (24, 1, 2)) * table.double()).sum(-1).flatten(-2)
    compare(rope(x, table), x, right, exact)


def test_rope_of_wide_rows_and_of_spread_elements_equals_float64() -> None:
    for x in (draw(1, 9, 3, 2048), draw(1, 9, 48, 3).mT):
        x, width = x.detach().requires_grad_(), x.shape[-1]
        table, exact = draw(1, 1, 3, width // 2, 2, 2, seed=1), x.detach().double().requires_grad_()
        right = (exact.unflatten(-1, (width // 2, 1, 2)) * table.double()).sum(-1).flatten(-2)
        compare(rope(x, table), x, right, exact)


# Images, tokens and width: partly filled tiles; several splits and tiles of columns; one element.
MODULATED = [((2, 21, 90), torch.float32), ((1, 70, 600), torch.float16), ((3, 1, 1), torch.bfloat16)]


@pytest.mark.parametrize("addend", ["none", "vector", "tokens"])
@pytest.mark.parametrize("shape, dtype", MODULATED, ids=str)
def test_modulate_equals_float64(
    shape: tuple[int, int, int], dtype: torch.dtype, addend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modulate_module, "_BACKWARD_PROGRAMS", 8)  # so that a program takes several tiles
    monkeypatch.setattr(modulate_module, "_REDUCE_SPLITS", 2)
    n, tokens, width = shape
    x = draw(n, tokens, width + 3)[..., 3:].to(dtype)  # parts of wider rows
    shift, scale = (draw(n, 1, 2 * width, seed=1) / 2).to(dtype).chunk(2, dim=-1)
    given = [x, 1 + scale]
    given += {"none": [], "vector": [shift], "tokens": [draw(*shape, seed=2).to(dtype)]}[addend]
    given = [tensor.detach().requires_grad_() for tensor in given]
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    ours = modulate(*given, *[None] * (addend == "none"))
    right = exact[0] * exact[1] + (exact[2] if len(exact) > 2 else 0)
    gradient = draw(*shape, seed=9).to(dtype)
    found = ours, *torch.autograd.grad(ours, given, gradient)
    wanted = right, *torch.autograd.grad(right, exact, gradient.double())
    for one, other in zip(found, wanted, strict=True):
        error = (one.double() - other).abs().max() / other.abs().max()
        assert one.dtype == dtype and one.shape == other.shape and error <= 2 * TOLERANCE[dtype], error


@pytest.mark.parametrize("wanted", [(0,), (0, 1), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("addend", ["vector", "tokens"])
def test_modulate_computes_the_gradients_that_are_asked_for(addend: str, wanted: tuple[int, ...]) -> None:
    given = [draw(2, 9, 30), draw(2, 1, 30, seed=1), draw(2, 1 if addend == "vector" else 9, 30, seed=2)]
    given = [tensor.requires_grad_(index in wanted) for index, tensor in enumerate(given)]
    leaves = [given[index] for index in wanted]
    for gradient in (draw(2, 9, 33, seed=3)[..., 3:], draw(30, 9, 2, seed=3).transpose(0, 2)):  # not contiguous
        found = torch.autograd.grad(modulate(*given), leaves, gradient)
        right = torch.autograd.grad(torch.addcmul(given[2], given[0], given[1]), leaves, gradient)
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


def test_modulate_keeps_no_tokens_for_a_constant_factor() -> None:
    saved: list[Tensor] = []
    x, factor = draw(2, 9, 30).requires_grad_(), draw(2, 1, 30, seed=1)
    with torch.autograd.graph.saved_tensors_hooks(lambda it: saved.append(it) or it, lambda it: it):
        modulate(x, factor, None)
    assert [tensor.shape for tensor in saved] == [factor.shape]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("tanh", [True, False])
def test_gelu_of_strided_rows_equals_float64(tanh: bool, dtype: torch.dtype) -> None:
    wide = (3 * draw(2, 9, 1300)).to(dtype)
    for x in (wide[..., 700:], wide[..., :40].transpose(1, 2), wide[:1, :2, :5]):
        x = x.detach().requires_grad_()
        exact = x.detach().double().requires_grad_()
        compare(gelu(x, tanh), x, F.gelu(exact, approximate="tanh" if tanh else "none"), exact)


def test_gelu_saturates_far_from_zero() -> None:
    for tanh in (True, False):
        x = torch.tensor([[-60.0, 0.0, 60.0]]).requires_grad_()
        (gradient,) = torch.autograd.grad(gelu(x, tanh).sum(), x)
        torch.testing.assert_close(gelu(x, tanh).detach(), torch.tensor([[0.0, 0.0, 60.0]]))
        torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.5, 1.0]]))


@pytest.mark.parametrize("name", list(Kernels("cpu").by_name()))
def test_kernels_compute_their_references_on_all_examples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "_multiprocessors", lambda device: 9)
    kernel = Kernels("cpu").by_name()[name]
    examples = kernel.examples(lambda *shape: draw(*shape).half())
    assert all(self_test.is_supported(kernel, arguments) for arguments in examples)
    error = self_test.max_relative_error([kernel], torch.device("cpu"), torch.float16)
    assert error <= 4 * TOLERANCE[torch.float16]
