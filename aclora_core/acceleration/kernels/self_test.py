"""Whether the kernels compute on a device what PyTorch computes: small examples of each, outputs and gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ConvParams, KernelGroup, Kernels

Draw = Callable[..., Tensor]  # random numbers of a shape
Case = tuple[Tensor, Tensor, tuple[Tensor, ...]]  # ours, PyTorch's, and what both come from


def largest_error(kernels: Kernels, device: torch.device, dtype: torch.dtype, part: KernelGroup) -> float:
    """How far outputs and gradients are from PyTorch's for small examples, as a share of the largest value.

    Ranks and types are those of most trainings, so that what is compiled for the examples is of use to them.
    """
    generator = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, device=device, dtype=dtype)
    with torch.inference_mode(False), torch.enable_grad():
        errors = [error.float() for trial in _TRIALS[part] for error in trial(kernels, draw)]
        return float(torch.stack(errors).max()) if errors else 0.0


def _errors_of_norms(kernels: Kernels, draw: Draw) -> list[Tensor]:
    hidden = draw(3, 512).requires_grad_()
    value, gate = hidden.chunk(2, dim=-1)
    cases: list[Case] = [(kernels.geglu(hidden), value * F.gelu(gate), (hidden,))]
    picture = draw(2, 320, 9, 10).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias, shift = draw(320), draw(320), draw(2, 320).requires_grad_()
    norm = functools.partial(kernels.group_norm, picture, 32, weight, bias, 1e-5)
    cases.append((norm(), F.group_norm(picture, 32, weight, bias, 1e-5), (picture,)))
    shifted = (picture.float() + shift.float()[:, :, None, None]).to(picture.dtype)
    cases.append((norm(True), F.silu(cases[1][1]), (picture,)))
    cases.append((norm(True, shift), F.silu(F.group_norm(shifted, 32, weight, bias, 1e-5)), (picture, shift)))
    rows = draw(70, 320).requires_grad_()
    cases.append((kernels.layer_norm(rows, weight, bias, 1e-5), F.layer_norm(rows, (320,), weight, bias), (rows,)))
    added = draw(70, 320).requires_grad_()
    for more in (None, added):
        both = kernels.residual_norm(rows, more, weight, bias, 1e-5)
        right = (rows if more is None else rows + more).clone()
        expected = torch.cat([right, F.layer_norm(right, (320,), weight, bias)])
        cases.append((torch.cat(both), expected, (rows,) if more is None else (rows, more)))
    return _errors(cases, draw)


def _errors_of_rows(kernels: Kernels, draw: Draw) -> list[Tensor]:
    """The same for what is computed by rows that lie apart."""
    heads, weight = draw(2, 7, 5, 64).transpose(1, 2).requires_grad_(), draw(64)
    slope = (heads.float().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    normed = (heads.float() * slope * weight.float()).to(heads.dtype)
    table = draw(1, 1, 7, 32, 2, 2).float()
    turned = (heads.float().unflatten(-1, (32, 1, 2)) * table).sum(-1).flatten(-2).to(heads.dtype)
    part = draw(9, 640)[:, :320].requires_grad_()
    cases = [
        (kernels.rms_norm(heads, weight, 1e-5), normed, (heads,)),
        (kernels.rotate(heads, table), turned, (heads,)),
        (kernels.gelu(part, True), F.gelu(part, approximate="tanh"), (part,)),
        (kernels.gelu(part, False), F.gelu(part), (part,)),
    ]
    return _errors(cases, draw)


def _errors_of_layers(kernels: Kernels, draw: Draw) -> list[Tensor]:
    """The same for two layers and their branches, in the types that there are kernels for."""
    rows = 2100  # so many that their sums are shared out
    x, weights, biases, gradients = draw(rows, 128), [*draw(2, 192, 128)], [*draw(2, 192)], [*draw(2, rows, 192)]
    downs, ups = [*draw(2, 16, 128)], [*draw(2, 192, 16)]
    if not kernels.take_backward(x, weights[0], 16):
        return []
    outputs, inner = kernels.linear.forward(x, weights, biases, downs, ups, 0.5)
    of_input, through = kernels.linear.backward(gradients, weights, downs, ups, 0.5)
    of_downs, of_ups = ([tensor.clone() for tensor in factors] for factors in (downs, ups))
    kernels.linear.add_gradients(x, gradients, inner, through, of_downs, of_ups, 0.5)
    right = torch.zeros_like(of_input)
    pairs = [(of_input, right)]
    layers = zip(weights, biases, downs, ups, gradients, strict=True)
    for number, (weight, bias, down, up, gradient) in enumerate(layers):
        pairs.append((outputs[number], x @ weight.t() + bias + 0.5 * (x @ down.t()) @ up.t()))
        pairs.append((of_ups[number], up + 0.5 * gradient.t() @ (x @ down.t())))
        pairs.append((of_downs[number], down + 0.5 * (gradient @ up).t() @ x))
        right += gradient @ weight + 0.5 * (gradient @ up) @ down
    return [_error(found, wanted) for found, wanted in pairs]


def _errors_of_convolution(kernels: Kernels, draw: Draw) -> list[Tensor]:
    """The same for a convolution's branch."""
    steps, last = ConvParams((1, 1), (1, 1), (1, 1)), torch.channels_last
    x, output, gradient = (draw(1, width, 9, 8).contiguous(memory_format=last) for width in (80, 48, 48))
    if not kernels.take_convolution(x, 48, 16):
        return []
    down, up = draw(16, 80, 3, 3).contiguous(memory_format=last).requires_grad_(), draw(48, 16).requires_grad_()
    wanted, bias = x.detach().requires_grad_(), draw(48)
    narrow = F.conv2d(wanted, down, None, *steps)
    result = 0.5 * F.conv2d(narrow, up[:, :, None, None])
    right = [narrow, result + bias[:, None, None], *torch.autograd.grad(result, (wanted, down, up), gradient)]
    through = gradient.permute(0, 2, 3, 1).reshape(-1, 48) @ up.detach()
    ours, of_input, of_down, of_up = (torch.zeros_like(it) for it in (output, x, down, up))
    inner = kernels.convolution.add_branch(ours, bias, x, down.detach(), up.detach(), steps, 0.5)
    kernels.convolution.add_gradients(x, gradient, inner, through, down.detach(), of_down, of_up, of_input, steps, 0.5)
    found = [inner.view(1, 9, 8, 16).permute(0, 3, 1, 2), ours, of_input, of_down, of_up]
    return [_error(one, other.detach()) for one, other in zip(found, right, strict=True)]


def _errors_of_attention(kernels: Kernels, draw: Draw) -> list[Tensor]:
    """The same for attention."""
    query, key, value = given = tuple(draw(1, 2, rows, 64).requires_grad_() for rows in (70, 77, 77))
    if not kernels.take_attention(query, key, value):
        return []
    exact = [tensor.float() for tensor in given]  # by hand: the libraries' takes long to load
    plain = (torch.softmax(0.125 * exact[0] @ exact[1].mT, -1) @ exact[2]).to(query.dtype)
    results = kernels.attention(query, key, value, 0.125), plain
    gradient = draw(1, 2, 70, 64)
    ways_back = [torch.autograd.grad(result, given, gradient) for result in results]
    return [_error(*(it.detach() for it in results)), *(_error(*pair) for pair in zip(*ways_back, strict=True))]


def _errors_of_adamw(kernels: Kernels, draw: Draw) -> list[Tensor]:
    """The same for a step of AdamW."""
    weights, first, second, before = (it.float() for it in draw(4, 1536))
    gradient, copy, start, second = draw(1536), draw(1536), weights.clone(), second.square()
    slope, mean, spread = gradient.float() / 2, first.clone(), second.clone()
    if not kernels.take(gradient) or gradient.dtype == torch.float32:
        return []
    numbers = [torch.full((), value, device=start.device) for value in (3.0, 0.1, 2.0, 0.0)]
    steps, rate, divisor, left_out = numbers
    kernels.adamw(
        weights, gradient, first, second, before, copy, steps, rate, divisor, left_out, (0.9, 0.999), 0.05, 1e-8
    )
    mean, spread = 0.9 * mean + 0.1 * slope, 0.999 * spread + 0.001 * slope.square()
    root = (spread / (1 - 0.999**3)).sqrt() + 1e-8
    right = start * (1 - 0.1 * 0.05) - 0.1 / (1 - 0.9**3) * mean / root
    pairs = [(weights, right), (copy, right), (first, mean), (second, spread), (before, start)]
    return [*(_error(*pair) for pair in pairs), gradient.abs().max()]


def _errors(cases: Sequence[Case], draw: Draw) -> list[Tensor]:
    """Those of outputs, and of gradients for one random gradient."""
    errors = []
    for ours, expected, sources in cases:
        gradient = draw(expected.shape)
        ways_back = [torch.autograd.grad(it, sources, gradient, retain_graph=True) for it in (ours, expected)]
        for found, right in ((ours.detach(), expected.detach()), *zip(*ways_back, strict=True)):
            errors.append(_error(found, right))
    return errors


def _error(found: Tensor, right: Tensor) -> Tensor:
    return (found - right).abs().max() / right.abs().max()


_TRIALS: dict[KernelGroup, tuple[Callable[[Kernels, Draw], list[Tensor]], ...]] = {
    "layers": (_errors_of_layers, _errors_of_adamw),
    "pictures": (_errors_of_norms, _errors_of_attention, _errors_of_convolution),
    "sequences": (_errors_of_rows,),
}
