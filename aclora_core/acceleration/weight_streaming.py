"""Frozen weights that do not fit on the GPU: they stay in main memory, and each block's come when it computes.

The weights of a streamed block lie in one region of pinned memory, in the format in which they were loaded. A ring of
buffers on the GPU holds those of the next few blocks: a copy stream fills one while the network computes with another.
A streamed block is recomputed in the backward pass, so its weights come once in the forward pass, in order, and once in
the backward pass, in reverse. Nothing is copied back, as frozen weights do not change.

Every block has a fixed place in the ring. So its parameters are views of that place, whose addresses never change, and
copies and waits can be recorded in a CUDA graph. A backward pass ends with the blocks in the ring with which the next
forward pass begins, and the other way round, so these come only once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..storage import as_parameter, component_tensors, map_components
from .activation_checkpointing import find_blocks

_SLOTS = 3  # buffers of the ring: one that is computed with, and two that are filled ahead
_ALIGNMENT = 512  # bytes


class Region(NamedTuple):
    """Main memory that holds all weights of a block."""

    block: nn.Module
    memory: Tensor  # uint8


def gather_weights(network: nn.Module) -> list[Region]:
    """Move the weights of each block of a network in main memory into one region, and return the regions in order.

    Convolutions are in channels_last from then on, the order that they are computed in. The values stay.
    """
    blocks = [block for block in find_blocks(network) if "forward" not in vars(block)]
    return [Region(block, _gather(_weights(block))) for block in blocks]


def _gather(tensors: Sequence[Tensor]) -> Tensor:
    sizes = [math.ceil(tensor.nbytes / _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
    memory = torch.empty(sum(sizes), dtype=torch.uint8)
    for tensor, offset in zip(tensors, itertools.accumulate(sizes, initial=0), strict=False):
        order = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
        source = tensor.data.contiguous(memory_format=order)
        target = memory[offset : offset + tensor.nbytes].view(tensor.dtype).as_strided(tensor.size(), source.stride())
        target.copy_(source)
        tensor.data = target
    return memory


class _Part(NamedTuple):
    """A weight, and where it lies in its block's region."""

    tensor: Tensor
    offset: int  # bytes

    def point_into(self, memory: Tensor) -> None:
        """Let the weight be a view of memory that holds its region."""
        flat = memory[self.offset : self.offset + self.tensor.nbytes].view(self.tensor.dtype)
        self.tensor.data = flat.as_strided(self.tensor.size(), self.tensor.stride())


class Streamed(NamedTuple):
    """A way to stream some blocks."""

    indices: list[int]
    copied: int  # bytes in each pass
    more: int  # bytes on the device beyond what is there while every block is streamed


class WeightStream:
    """Streams the blocks of a network to a device; everything else of the model is moved there.

    Args:
        model: in main memory.
        network: the part of the model that has the blocks.
        regions: of its blocks, as gather_weights made them.
        device: where the network computes.

    Attributes:
        blocks: the modules that can be streamed, in the order in which they compute.
        streamed: indices of those that are streamed, in order; the others are kept on the device.
        all_pinned: whether all regions are pinned. Memory that is not is copied while nothing else runs.
    """

    def __init__(self, model: nn.Module, network: nn.Module, regions: Sequence[Region], device: torch.device) -> None:
        self.network, self.device = network, device
        self.blocks = [region.block for region in regions]
        self.streamed: list[int] = []
        self.all_pinned = False
        self._model = model
        self._hosts = [region.memory for region in regions]
        self._parts = [_parts(region) for region in regions]
        self._kept: set[int] = set()
        self._positions: dict[int, int] = {}  # index of a block -> position in `streamed`
        self._ring: list[Tensor] = []
        on_gpu = device.type == "cuda"
        self._copies = torch.cuda.Stream(device) if on_gpu else None
        self._copied = [torch.cuda.Event() for _ in range(_SLOTS)] if on_gpu else []
        self._held: list[int | None] = [None] * _SLOTS  # position of the block that is in each buffer, or comes
        self._coming = [False] * _SLOTS  # whether the current stream has not waited for it yet
        self._joining = False

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Put the model on the device, all blocks streamed; on exit it is in main memory again."""
        with ExitStack() as undo:
            self.all_pinned = (
                all([_pinned(undo, host, self.device) for host in self._hosts]) and self._copies is not None
            )
            undo.callback(self._unload)
            inside = {id(part.tensor) for parts in self._parts for part in parts}
            for tensor in _weights(self._model):
                if id(tensor) not in inside:
                    undo.callback(setattr, tensor, "data", tensor.data)
                    tensor.data = tensor.data.to(self.device)
            self.stream(range(len(self.blocks)))
            _rebuild_quantised(self._model, undo)
            yield

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Fetch a block's weights before its forward pass, while this lasts."""
        with ExitStack() as undo:
            undo.callback(self.network.register_forward_pre_hook(lambda *_: self._begin()).remove)
            undo.callback(self.network.register_forward_hook(lambda *_: self._join()).remove)
            for index, block in enumerate(self.blocks):
                undo.callback(vars(block).pop, "forward", None)
                block.forward = self._fetching(index, block.forward)
            yield

    @property
    def sizes(self) -> list[int]:
        """Bytes of each block's weights."""
        return [host.numel() for host in self._hosts]

    def measured_rate(self) -> float:
        """Return how many bytes a second are copied to the device, measured with the largest streamed block."""
        if not self._copies:
            return math.inf  # nothing is copied beside the computing
        index = max(self.streamed, key=lambda index: self._hosts[index].numel())
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        began.record(self._copies)
        self._start(self._positions[index])
        ended.record(self._copies)
        torch.cuda.synchronize(self.device)
        self.forget()
        return 1000 * self._hosts[index].numel() / began.elapsed_time(ended)

    def choices(self) -> list[Streamed]:
        """Return ways to stream some blocks, from none to all; they are spread evenly."""
        count, sizes = len(self.blocks), self.sizes
        ring = sum(buffer.numel() for buffer in self._ring)
        found = []
        for number in range(count + 1):
            chosen = _spread(number, count)
            copied = sum(sizes[index] for index in chosen)
            found.append(Streamed(chosen, copied, sum(sizes) - copied - (0 if number else ring)))
        return found

    def stream(self, indices: Sequence[int]) -> None:
        """Stream these blocks from now on, and keep the others on the device."""
        kept = set(range(len(self.blocks))) - set(indices)
        for index in self._kept - kept:  # their memory may be what the ring needs
            self._point(index, self._hosts[index])
        self._make_ring(max((self._hosts[index].numel() for index in indices), default=0))
        if self._copies:
            torch.cuda.empty_cache()  # weights in gaps between freed activations would keep these from being used again
        for index in kept - self._kept:
            self._point(index, self._hosts[index].to(self.device))
        self.streamed, self._kept = sorted(indices), kept
        self._positions = {index: position for position, index in enumerate(self.streamed)}
        for index, position in self._positions.items():
            self._point(index, self._ring[position % _SLOTS])
        self.forget()

    def stream_more(self) -> bool:
        """Stream another tenth of the blocks, at least two; return whether that changes anything."""
        changed, count = bool(self._kept), len(self.blocks)
        if changed:
            self.stream(_spread(min(count, len(self.streamed) + max(2, math.ceil(count / 10))), count))
        return changed

    # --- the ring between passes; CUDA graphs rely on it ---

    @property
    def content(self) -> list[int | None]:
        """Positions of the blocks that the buffers hold."""
        return list(self._held)

    @content.setter
    def content(self, held: list[int | None]) -> None:
        self._held = list(held)

    def rewind(self) -> None:
        """Have the ring hold the first blocks, with which a forward pass begins."""
        self._begin()
        self._join()

    def forget(self) -> None:
        """Take the ring's content as unknown: what was recorded in a graph that failed has not been copied."""
        self._held, self._coming, self._joining = [None] * _SLOTS, [False] * _SLOTS, False

    # --- where weights lie ---

    def _make_ring(self, size: int) -> None:
        """Allocate buffers of so many bytes; the old ones are freed first."""
        if self._ring and self._ring[0].numel() == size:
            return
        for index in self._positions:
            self._point(index, self._hosts[index])
        self._ring = []
        self._ring = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(_SLOTS) if size]

    def _point(self, index: int, memory: Tensor) -> None:
        for part in self._parts[index]:
            part.point_into(memory)

    def _unload(self) -> None:
        if self._copies:
            torch.cuda.synchronize(self.device)
        for index, host in enumerate(self._hosts):
            self._point(index, host)
        self._ring, self._kept, self._positions, self.streamed = [], set(), {}, []

    # --- when they come ---

    def _begin(self) -> None:
        """Start those copies of the first blocks that the ring does not hold."""
        self._joining = False  # a backward pass that failed has not called it back
        for position in range(min(_SLOTS, len(self.streamed))):
            if self._held[position] != position:
                self._start(position)

    def _fetching(self, index: int, compute: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if index in self._positions:
                self._fetch(self._positions[index])
            return compute(*args, **kwargs)

        return forward

    def _fetch(self, position: int) -> None:
        """Wait for a block's weights, and start the copies of those that come after it."""
        slot = position % _SLOTS
        if self._held[slot] != position:
            self._start(position)
        if self._copies and self._coming[slot]:  # else it was waited for, perhaps outside of a graph that is recorded
            torch.cuda.current_stream(self.device).wait_event(self._copied[slot])
            self._coming[slot] = False
        direction = -1 if self._in_backward_pass() else 1
        for ahead in range(1, _SLOTS):
            following = position + direction * ahead
            if 0 <= following < len(self.streamed) and self._held[following % _SLOTS] != following:
                self._start(following)

    def _start(self, position: int) -> None:
        """Start copying a block's weights, once all that was launched before has been computed."""
        slot, host = position % _SLOTS, self._hosts[self.streamed[position]]
        self._held[slot] = position
        buffer = self._ring[slot][: host.numel()]
        if not self._copies:
            buffer.copy_(host)
            return
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            buffer.copy_(host, non_blocking=True)
        self._copied[slot].record(self._copies)
        self._coming[slot] = True

    def _in_backward_pass(self) -> bool:
        if torch._C._current_graph_task_id() == -1:
            return False
        if self._copies and not self._joining:
            self._joining = True
            torch.autograd.Variable._execution_engine.queue_callback(self._join)
        return True

    def _join(self) -> None:
        """Wait for all copies; a captured graph may not end before them."""
        self._joining = False
        if self._copies and any(self._coming):
            torch.cuda.current_stream(self.device).wait_stream(self._copies)
        self._coming = [False] * _SLOTS


def _weights(module: nn.Module) -> list[Tensor]:
    """The plain tensors that a module's parameters and buffers are made of, each once."""
    tensors = [*module.parameters(), *module.buffers()]
    return list({id(part): part for tensor in tensors for part in component_tensors(tensor)}.values())


def _spread(number: int, count: int) -> list[int]:
    """Return so many indices below count, as evenly spaced as possible."""
    return [position * count // number for position in range(number)]


def _parts(region: Region) -> list[_Part]:
    return [_Part(tensor, int(tensor.storage_offset()) * tensor.element_size()) for tensor in _weights(region.block)]


def _pinned(undo: ExitStack, memory: Tensor, device: torch.device) -> bool:
    """Pin memory until the stack is closed, and return whether that worked.

    It is registered and not allocated as pinned, as PyTorch would round its size up to a power of two.
    """
    if not torch.cuda.is_available() or not memory.numel():
        return not memory.numel()
    runtime = torch.cuda.cudart()
    if int(runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0)) != 0:
        with suppress(RuntimeError):  # CUDA keeps the error, and PyTorch raises it at its next kernel: this one
            torch.zeros(1, device=device)
        return False
    undo.callback(runtime.cudaHostUnregister, memory.data_ptr())
    return True


def _rebuild_quantised(model: nn.Module, undo: ExitStack) -> None:
    """Make quantised weights anew from the tensors that they are made of: their device is fixed when they are made."""
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None and hasattr(tensor, "__tensor_flatten__"):
                undo.callback(module._parameters.__setitem__, name, tensor)
                module._parameters[name] = as_parameter(map_components(tensor, lambda inner: inner))  # type: ignore[assignment]
