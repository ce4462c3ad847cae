"""A function recorded once as a CUDA graph and replayed: thousands of kernels for the price of one launch.

Small kernels are launched more slowly than they run, so an eager step waits for the processor most of the time. A graph
has fixed inputs: each call copies its own into them.
"""

from __future__ import annotations

import functools
import gc
import logging
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from ..storage import map_tensors, tensors_in

log = logging.getLogger("aclora")


def _given(value: Any, device: torch.device, copy: bool = False) -> Any:
    """The same on the device as leaves of their own; what asks for a gradient gets it there, not where it came from."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, copy=copy).requires_grad_(tensor.requires_grad)

    return map_tensors(value, leaf)


@functools.lru_cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream on which all graphs are recorded: libraries keep memory for every stream that they have seen."""
    return torch.cuda.Stream(device)


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """Has what waits for the GPU fail, as it would in a recording; there, what comes after is worse than an error.

    With the allocator that ComfyUI chooses, memory of a recording that has failed cannot even be freed.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that not everything that waits is found
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class CudaGraphRunner:
    """Runs functions on a device, recorded as CUDA graphs where that is possible and wished.

    All graphs share their memory: a result is good until the next call.
    """

    def __init__(self, device: torch.device, wished: bool = True) -> None:
        self.device = device
        self.active = wished and device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self.active else None
        self._recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor], Any]] = {}

    def call(
        self, function: Callable[[Any], Any], argument: Any, key: Hashable = (), changes: Sequence[Tensor] = ()
    ) -> Any:
        """function(argument), with the argument's tensors moved to the device.

        key: what decides the graph besides the function; arguments with one key differ only in their tensors' values.
        changes: tensors that the function changes in place, so that trial runs can be taken back. A function that
        cannot be recorded, as it waits for the GPU in its middle, is run as it is from then on.
        """
        if not self.active:
            return function(_given(argument, self.device))
        key = (function, key)
        if key not in self._recorded:
            # In main memory, since a step may just fit into that of the GPU.
            before = [tensor.detach().to("cpu", copy=True) for tensor in changes]
            try:
                self._recorded[key] = self._record(function, argument)
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._give_up(error)
            finally:  # also where memory was too short: the step is done again, and would count twice
                with torch.no_grad():
                    for tensor, value in zip(changes, before, strict=True):
                        tensor.copy_(value)
            if not self.active:
                return function(_given(argument, self.device))
        graph, inputs, output = self._recorded[key]
        for fixed, given in zip(inputs, tensors_in(argument), strict=True):
            fixed.detach().copy_(given.detach(), non_blocking=True)
        graph.replay()
        return output

    def recorded(self, function: Callable[[Any], Any], key: Hashable = ()) -> bool:
        """Whether a call only has to be started, so that the processor goes on at once."""
        return (function, key) in self._recorded

    def reading(self, result: Tensor) -> Callable[[], list[float]]:
        """A function that gives a call's numbers as soon as they are there, whatever is called in the meantime."""
        if self.device.type != "cuda":
            return result.tolist
        copied, done = torch.empty_like(result, device="cpu", pin_memory=True), torch.cuda.Event()
        copied.copy_(result, non_blocking=True)
        done.record(torch.cuda.current_stream(self.device))

        def read() -> list[float]:
            done.synchronize()
            return list(copied.tolist())

        return read

    def clear(self) -> None:
        """Forgets what was recorded, and frees its memory."""
        self._recorded.clear()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def _record(self, function: Callable[[Any], Any], argument: Any) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Any]:
        fixed = _given(argument, self.device, copy=True)
        stream = capture_stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream), _refusing_to_wait():  # libraries choose and load their kernels in a first run
            output = map_tensors(function(fixed), lambda tensor: torch.empty_like(tensor, requires_grad=False))
        # A step that has failed may live on in its error, with nodes that would wait for the stream that it was on.
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # what the first run held is needed for the graph's own memory
        graph = torch.cuda.CUDAGraph()
        # What other threads do with the GPU meanwhile, such as freeing memory, is no part of it and no error.
        recording = torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local")
        # The outer context puts the stream back where recording fails; the inner one does not.
        with torch.cuda.stream(stream), recording:
            _copy(function(fixed), output)  # so that no memory of the graph is in anybody's hands
        # A network may keep a tensor of its last run; that memory is only there once the graph has run.
        graph.replay()
        return graph, list(tensors_in(fixed)), output

    def _give_up(self, error: BaseException) -> None:
        """Goes on without graphs. The last of several errors only says that there was one before."""
        with suppress(RuntimeError, AttributeError):  # else the allocator waits for the end of what has failed
            torch._C._cuda_endAllocateToPool(self.device.index or 0, self._pool)  # type: ignore[arg-type]
        while error.__context__ is not None:
            error = error.__context__
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise error
        self.active = False
        self.clear()
        log.info(
            "AC-LoRA: this model cannot be recorded as a CUDA graph (%s), so its steps are slower.",
            str(error).split("\n")[0],
        )


def _copy(source: Any, target: Any) -> None:
    """Fills the tensors of one nesting with those of another."""
    for given, own in zip(tensors_in(source), tensors_in(target), strict=True):
        own.copy_(given)
