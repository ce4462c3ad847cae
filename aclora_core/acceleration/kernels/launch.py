"""Launch kernels by the addresses of their tensors, and compile many of them in parallel.

If a kernel is given tensors, Triton asks the driver about each whether the GPU can reach it. With the allocator that
ComfyUI chooses (cudaMallocAsync), memory of a graph that is being captured has an address but does not exist yet, and
the driver says no.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from ..pace import keep_pace
from ._triton import JITFunction

_compile: Callable[..., None] | None = None  # receives the launches while kernels are only compiled


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run kernel[grid](*arguments, **options), or only note it for compilation within compiling_together.

    Args:
        kernel: a function decorated with triton.jit.
        grid: the number of programs along up to three axes.
        arguments: all arguments of the kernel in their order, its constants included.
        options: num_warps and num_stages.
    """
    if _compile is not None:
        _compile(kernel, grid, arguments, options)
        return
    keep_pace()
    if not isinstance(kernel, JITFunction):  # of Triton's interpreter
        kernel[grid](*arguments, **options)
        return
    compiled = kernel.run(*arguments, grid=grid, warmup=True, **options)
    addresses = (argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments)
    compiled[(*grid, 1, 1)[:3]](*addresses)


@contextmanager
def compiling_together(device: torch.device) -> Iterator[None]:
    """Compile the kernels launched in this block in parallel instead of running them; done when the block ends.

    What the block computes is of no use, but the first pass through a network takes seconds instead of a minute.
    """
    global _compile
    seen: set[Hashable] = set()

    def compile_one(work: Callable[[], Any]) -> None:
        on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with suppress(Exception), on_device:  # a kernel that cannot be compiled raises when it is run
            work()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # more threads wait for Python's lock

        def compile_once(kernel: Any, grid: Any, arguments: Any, options: Any) -> None:
            variant = _variant(kernel, arguments, options)
            if variant not in seen:
                seen.add(variant)
                pool.submit(compile_one, _compilation(kernel, grid, arguments, options))

        _compile = compile_once
        try:
            yield
        finally:
            _compile = None


def _variant(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Hashable:
    """The properties Triton specialises on: dtypes, constants, and whether an integer is 1 or a multiple of 16."""

    def kind(parameter: Any, argument: Any) -> Hashable:
        if isinstance(argument, Tensor):
            return argument.dtype
        if parameter.is_constexpr:
            return argument
        return isinstance(argument, int) and not parameter.do_not_specialize and (argument == 1, argument % 16 == 0)

    kinds = (kind(parameter, argument) for parameter, argument in zip(kernel.params, arguments, strict=False))
    return kernel, *kinds, *sorted(options.items())


def _compilation(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]
) -> Callable[[], Any]:
    # Dtypes in place of tensors, whose memory would otherwise be kept until then.
    kinds = [argument.dtype if isinstance(argument, Tensor) else argument for argument in arguments]
    return lambda: kernel.warmup(*kinds, grid=grid, **options).run  # reading `run` compiles it
