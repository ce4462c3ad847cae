"""Capture a function once as a CUDA graph and replay it: thousands of kernels for the price of one launch.

Small kernels take longer to launch than to run, so an eager step mostly waits for the CPU. A graph has fixed inputs;
each call copies its own into them.
"""

from __future__ import annotations

import functools
import gc
import logging
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..storage import map_tensors, tensors_in
from .graph_memory import release_graph_memory
from .out_of_memory import is_out_of_memory, out_of_memory_named
from .pace import paced

log = logging.getLogger("aclora")


class Buffers(Protocol):
    """Memory whose content a captured function finds and changes, such as the ring of streamed weights."""

    @property
    def content(self) -> Any:
        """What the buffers hold."""

    @content.setter
    def content(self, value: Any) -> None: ...

    def rewind(self) -> None:
        """Have the buffers hold what every pass begins with, on the current stream."""

    def forget(self) -> None:
        """Take the content as unknown."""


class _Captured(NamedTuple):
    """A graph, its fixed inputs and its result, and what it leaves in buffers."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Any
    content: Any = None


def _leaves_on(device: torch.device, value: Any, copy: bool = False) -> Any:
    """Move nested tensors to the device as new leaves, whose gradients do not flow back to the given tensors."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, copy=copy).requires_grad_(tensor.requires_grad)

    return map_tensors(value, leaf)


@functools.lru_cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream on which all graphs are captured, since libraries keep memory for every stream they have seen."""
    return torch.cuda.Stream(device)


@contextmanager
def _sync_raises() -> Iterator[None]:
    """Make any host-device sync raise now.

    During capture it would fail too, and leave the allocator unusable: with the one that ComfyUI chooses, the memory of
    a failed capture cannot even be freed.
    """
    previous = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it does not detect every sync
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(previous)


class CudaGraphRunner:
    """Runs functions on a device, captured as CUDA graphs if enabled and possible.

    All graphs share one memory pool: the result of a call is valid until the next call.

    Args:
        device: where the functions run.
        enabled: whether functions are captured; without it, and on other devices than CUDA, they run eagerly.
        buffers: of streamed weights, if the functions use any.

    Attributes:
        active: whether functions are captured.
        in_pace: whether eager runs are paced, as memory is short where weights are streamed. Plans count on that, so it
            stays where a function cannot be captured.
    """

    def __init__(self, device: torch.device, enabled: bool = True, buffers: Buffers | None = None) -> None:
        self.device = device
        self._buffers = buffers
        self.active = enabled and device.type == "cuda"
        self.in_pace = self.active and buffers is not None
        self._pool = torch.cuda.graph_pool_handle() if self.active else None
        self._captured: dict[Hashable, _Captured] = {}

    def call(
        self, function: Callable[[Any], Any], argument: Any, key: Hashable = (), mutated: Sequence[Tensor] = ()
    ) -> Any:
        """Run function(argument), with the argument's tensors moved to the device.

        If a function cannot be captured, for instance because it waits for the GPU, this and all later calls run
        eagerly.

        Args:
            function: the function; takes and returns nested tensors.
            argument: its argument.
            key: selects the graph besides the function; arguments with one key differ only in their tensors' values.
            mutated: tensors that the function changes in place, so that the runs before the capture can be undone.

        Returns:
            The function's result, valid until the next call.

        Raises:
            torch.cuda.OutOfMemoryError: there is too little memory for the function or its capture.
        """
        key = (function, key)
        if self.active and key not in self._captured:
            # In CPU memory, since a step may only just fit into that of the GPU.
            backups = [tensor.detach().to("cpu", copy=True) for tensor in mutated]
            ran_out = False
            try:
                self._captured[key] = self._capture(function, argument)
            except torch.cuda.OutOfMemoryError:
                if not self._captured:
                    raise
                ran_out = True
            except RuntimeError as error:
                self._disable(error)
            finally:  # also if memory ran out: the step is repeated, and would count twice
                with torch.no_grad():
                    for tensor, backup in zip(mutated, backups, strict=True):
                        tensor.copy_(backup)
            if ran_out:  # not while the error is handled, which holds memory of the run that failed
                self.clear()  # the pool of the other graphs may be what the run before a capture needs
                return self.call(function, argument, key[1], mutated)
        if not self.active:
            with paced(self.in_pace), out_of_memory_named():
                return function(_leaves_on(self.device, argument))
        captured = self._captured[key]
        for fixed, given in zip(captured.inputs, tensors_in(argument), strict=True):
            fixed.detach().copy_(given.detach(), non_blocking=True)
        if self._buffers:
            self._buffers.rewind()
        with out_of_memory_named():
            captured.graph.replay()
        if self._buffers:
            self._buffers.content = captured.content
        return captured.output

    def is_captured(self, function: Callable[[Any], Any], key: Hashable = ()) -> bool:
        """Return whether a call only launches a graph, so that the CPU continues immediately."""
        return (function, key) in self._captured

    def async_read(self, result: Tensor) -> Callable[[], list[float]]:
        """Start copying a call's result to the CPU.

        Args:
            result: one axis; later calls may overwrite it before the copy is read.

        Returns:
            A function that waits for the copy and returns its values.
        """
        if self.device.type != "cuda":
            return result.tolist
        copied, done = _in_main_memory(result), torch.cuda.Event()
        copied.copy_(result, non_blocking=True)
        done.record(torch.cuda.current_stream(self.device))

        def read() -> list[float]:
            done.synchronize()
            return list(copied.tolist())

        return read

    def clear(self) -> None:
        """Discard all graphs and free their memory."""
        self._captured.clear()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            release_graph_memory(self.device)

    def _capture(self, function: Callable[[Any], Any], argument: Any) -> _Captured:
        try:
            with out_of_memory_named():
                return self._record(function, argument)
        except BaseException:
            if self._buffers:  # copies of a failed capture never come
                self._buffers.forget()
            raise

    def _record(self, function: Callable[[Any], Any], argument: Any) -> _Captured:
        fixed = _leaves_on(self.device, argument, copy=True)
        stream = _capture_stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        # Libraries choose and load their kernels in the first run.
        with torch.cuda.stream(stream), _sync_raises(), paced(self.in_pace):
            output = map_tensors(function(fixed), lambda tensor: torch.empty_like(tensor, requires_grad=False))
        # A failed step may live on in its error, with autograd nodes that would wait for the stream it was on.
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # the graph's own pool needs the memory of the first run
        if self._buffers:
            self._buffers.rewind()
            torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile, for instance to free memory, without breaking the capture.
        capture = torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local")
        # The outer context restores the stream if the capture fails; the inner one does not.
        with torch.cuda.stream(stream), capture:
            _copy_nested(function(fixed), output)  # so that the result is not in the graph's memory
        # A network may keep a tensor of its last run, whose memory exists only once the graph has run.
        graph.replay()
        return _Captured(graph, list(tensors_in(fixed)), output, self._buffers and self._buffers.content)

    def _disable(self, error: BaseException) -> None:
        """Continue without graphs. Of a chain of errors the first tells the cause."""
        with suppress(RuntimeError, AttributeError):  # otherwise the allocator waits for the end of the failed capture
            torch._C._cuda_endAllocateToPool(self.device.index or 0, self._pool)  # type: ignore[arg-type]
        while error.__context__ is not None:
            error = error.__context__
        if is_out_of_memory(error):
            raise torch.cuda.OutOfMemoryError(str(error)) from error
        self.active = False
        self.clear()
        log.info(
            "AC-LoRA: steps are slower: this model cannot be captured as a CUDA graph (%s).",
            str(error).split("\n")[0],
        )


def _in_main_memory(result: Tensor) -> Tensor:
    """Return an empty tensor like a result, pinned if that is possible; into others the GPU copies at once."""
    try:
        return torch.empty_like(result, device="cpu", pin_memory=True)
    except RuntimeError:
        return torch.empty_like(result, device="cpu")


def _copy_nested(source: Any, target: Any) -> None:
    """Copy nested tensors into others of the same nesting."""
    for source_tensor, target_tensor in zip(tensors_in(source), tensors_in(target), strict=True):
        target_tensor.copy_(source_tensor)
