"""Self-test of the fused kernels: results and gradients of their examples against their PyTorch references.

Ranks and dtypes of the examples are those of most trainings, so that the variants compiled for them are used later.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...storage import tensors_in
from .kernel import Draw, Kernel


def max_relative_error(kernels: Iterable[Kernel[..., ..., Any]], device: torch.device, dtype: torch.dtype) -> float:
    """Run the kernels on their examples and return how far they are from their references.

    Examples beyond a kernel's limits, such as those in a dtype it does not support, are skipped.

    Args:
        kernels: the kernels to test.
        device: where the examples are made.
        dtype: of the examples' activations.

    Returns:
        The largest absolute error of an output, an argument changed in place or a gradient, relative to the largest
        absolute value of the reference; NaN if a result is NaN, 0 if there is nothing to test.
    """
    generator = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, device=device, dtype=dtype)
    errors: list[Tensor] = []
    with torch.inference_mode(False), torch.enable_grad():
        for kernel in kernels:
            for arguments in kernel.examples(draw):
                if is_supported(kernel, arguments):
                    errors += _errors(kernel, arguments, draw)
        return float(torch.stack(errors).max()) if errors else 0.0


def is_supported(kernel: Kernel[..., ..., Any], arguments: tuple[Any, ...]) -> bool:
    """Return whether a kernel supports a call with these arguments."""
    by_name = inspect.signature(kernel.reference).bind(*arguments).arguments
    return kernel.supports(*(by_name[name] for name in inspect.signature(kernel.limits).parameters))


def _errors(kernel: Kernel[..., ..., Any], arguments: tuple[Any, ...], draw: Draw) -> list[Tensor]:
    """Relative errors of all that a call returns, changes in place and propagates back."""
    found_inputs = _copied(arguments)
    expected_inputs = _copied(arguments)
    found = list(tensors_in(kernel.operation(*found_inputs)))
    expected = list(tensors_in(kernel.reference(*expected_inputs)))
    grad_outputs = [draw(output.shape) for output in expected]
    found = _results(found, found_inputs, grad_outputs)
    expected = _results(expected, expected_inputs, grad_outputs)
    return [_relative_error(*pair) for pair in zip(found, expected, strict=True)]


def _results(outputs: list[Tensor], inputs: tuple[Any, ...], grad_outputs: list[Tensor]) -> list[Tensor]:
    """The outputs, the inputs as the call left them, and the gradients of those inputs that require one."""
    leaves = [tensor for tensor in tensors_in(inputs) if tensor.requires_grad]
    gradients = torch.autograd.grad(outputs, leaves, grad_outputs) if leaves else ()
    return [tensor.detach() for tensor in (*outputs, *tensors_in(inputs), *gradients)]


def _copied(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copy the tensors among the arguments, so that two calls cannot change each other's."""
    copies: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            copies.append(_copy(argument))
        elif isinstance(argument, list):
            copies.append([_copy(tensor) for tensor in argument])
        else:
            copies.append(argument)
    return tuple(copies)


def _copy(tensor: Tensor) -> Tensor:
    """Copy with the same strides, also where the tensor is a part of a larger one."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)


def _relative_error(found: Tensor, expected: Tensor) -> Tensor:
    largest = expected.abs().max().float()
    error = (found.float() - expected.float()).abs().max()
    return torch.where(largest == 0, error, error / largest)
