"""Starts kernels by the addresses of their tensors, and compiles many at once. Importing this file needs Triton.

Given tensors, Triton asks the driver for each whether the GPU can reach it. With the allocator that ComfyUI chooses
(cudaMallocAsync), memory of a graph that is being recorded has an address but is not there yet, and the driver says no.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction  # type: ignore[import-untyped,import-not-found,unused-ignore]

_compile: Callable[..., None] | None = None  # takes what is launched, while it is only to be compiled


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """kernel[grid](*arguments, **options), for all arguments in their order."""
    if _compile is not None:
        _compile(kernel, grid, arguments, options)
        return
    if not isinstance(kernel, JITFunction):  # the interpreter's
        kernel[grid](*arguments, **options)
        return
    compiled = kernel.run(*arguments, grid=grid, warmup=True, **options)
    addresses = (it.data_ptr() if isinstance(it, Tensor) else it for it in arguments)
    compiled[(*grid, 1, 1)[:3]](*addresses)


@contextmanager
def compiling_together(device: torch.device) -> Iterator[None]:
    """Kernels launched in the context do not run, but are compiled next to each other, until its end.

    So what is computed there is of no use, but a first pass through a network takes seconds instead of a minute.
    """
    global _compile
    seen: set[Hashable] = set()

    def compile_one(work: Callable[[], Any]) -> None:
        chosen = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with suppress(Exception), chosen:  # what cannot be compiled says so when it is to run
            work()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # more wait for Python's lock

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
    """What Triton compiles a kernel anew for: types, constants, and whether a number is 1 or a multiple of 16."""

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
    # Types for tensors, whose memory would else be kept until then.
    kinds = [it.dtype if isinstance(it, Tensor) else it for it in arguments]
    return lambda: kernel.warmup(*kinds, grid=grid, **options).run  # which is compiled when it is asked for
