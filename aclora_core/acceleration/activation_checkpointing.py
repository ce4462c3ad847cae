"""Memory that fits by itself: what a step keeps for its way back, block by block, and computing blocks anew instead.

A step needs most of its memory for the activations that its backward pass reads. A block of the network can give its
own up and compute them a second time when they are needed (Chen et al. 2016, arXiv 1604.06174), at a third more time.
Or the rows of a step go through one part after the other, and their gradients add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..storage import map_tensors, tensors_in
from .inplace import NoInplaceAdd
from .layers import is_linear

_RESERVE = 0.8  # share of the free memory to plan for: libraries work in some, and allocators leave gaps


# What a step takes besides the time of its rows, in that of one: each of its parts, and each row where all blocks are
# computed twice. Of SDXL at 1024² on an H100 (bench/README.md): 59 ms for one row and 182 for four; then 82 and 252.
_PART, _AGAIN = 0.45, 0.38


_PASSING = 2.0  # times the largest block: its gradients, and the activations that live for a moment only


@dataclass(frozen=True)
class ActivationSizes:
    """Bytes that one row keeps for the way back."""

    blocks: list[int]  # within each block
    outside: int  # between and around them

    def peak(self, rows: int, again: set[int]) -> int:
        """Bytes that a step of so many rows takes at most, when the blocks `again` are computed twice."""
        kept = sum(size for number, size in enumerate(self.blocks) if number not in again)
        return round(rows * (self.outside + kept + _PASSING * max(self.blocks, default=0)))


class _Plan(NamedTuple):
    """How a step may go, and what it takes."""

    fits: bool
    time: float  # in that of a row
    peak: int  # bytes
    rows: int  # at a time
    again: set[int]  # blocks that are computed twice


def find_blocks(network: nn.Module) -> list[nn.Module]:
    """The smallest repeated parts of a network that hold two layers with weights or more, in their order."""

    def weighty(module: nn.Module) -> int:
        return sum(is_linear(part) or isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d) for part in module.modules())

    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    parts = {id(part): part for group in lists for part in group if weighty(part) > 1}
    chosen = [part for part in network.modules() if id(part) in parts]
    return [part for part in chosen if not any(id(inner) in parts for inner in part.modules() if inner is not part)]


class ActivationCheckpointing:
    """The blocks of a network, and which of them are computed again on the way back."""

    def __init__(self, network: nn.Module) -> None:
        self.blocks = [block for block in find_blocks(network) if "forward" not in vars(block)]
        self.again: set[int] = set()
        self.out_of_place = False  # whether the network would overwrite what its backward pass needs
        self._measured: list[int] | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Has the blocks ask how they are to be computed, for as long as the context lasts."""
        with ExitStack() as undo:
            for number, block in enumerate(self.blocks):
                block.forward = self._asking(number, block.forward)
                undo.callback(delattr, block, "forward")
            yield

    def _asking(self, number: int, compute: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._measured is not None:
                return self._measure_block(number, compute, args, kwargs)
            if number in self.again and torch.is_grad_enabled():
                return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
            return compute(*args, **kwargs)

        def run(*args: Any, **kwargs: Any) -> Any:
            # The second time is in another thread, where the modes of the first are not known.
            with NoInplaceAdd() if self.out_of_place else nullcontext():
                return compute(*args, **kwargs)

        return forward

    def _measure_block(self, number: int, compute: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        assert self._measured is not None
        before = torch.cuda.memory_allocated()
        output = compute(*args, **kwargs)
        own = sum(tensor.nbytes for tensor in tensors_in(output))
        self._measured[number] += max(0, torch.cuda.memory_allocated() - before - own)
        # Cut off from its past, the block's memory is free for the next one.
        return map_tensors(output, lambda it: it.detach().requires_grad_() if it.is_floating_point() else it)

    def measure(self, forward: Callable[[], Any]) -> ActivationSizes:
        """What one row keeps. forward: a forward pass of one row with gradients on, on a CUDA device."""
        self._measured = [0] * len(self.blocks)
        try:
            forward()  # the first run loads libraries, whose memory is not the activations'
            self._measured = [0] * len(self.blocks)
            before = torch.cuda.memory_allocated()
            result = forward()
            outside = max(0, torch.cuda.memory_allocated() - before)
            del result
            return ActivationSizes(self._measured, outside)
        finally:
            self._measured = None

    def fit(self, kept: ActivationSizes, rows: int, free: int) -> tuple[int, int]:
        """Has blocks computed again, so that a step of so many rows stays within the free memory in the least time.

        Gives the bytes expected, and how many rows go through at a time: all, unless fewer are quicker or alone fit.
        """
        plans = [self._plan(kept, rows, parts, free) for parts in range(1, rows + 1)]
        best = min(plans, key=lambda plan: (not plan.fits, plan.time if plan.fits else plan.peak))
        self.again = best.again
        return best.peak, best.rows

    def _plan(self, kept: ActivationSizes, rows: int, parts: int, free: int) -> _Plan:
        """As few blocks computed again as it takes for a step in so many parts, alike in size, to fit."""
        each, again = math.ceil(rows / parts), set[int]()
        for number in sorted(range(len(self.blocks)), key=lambda number: -kept.blocks[number]):
            if kept.peak(each, again) <= free * _RESERVE:
                break
            again.add(number)
        share = sum(kept.blocks[number] for number in again) / max(1, sum(kept.blocks))
        time = _PART * math.ceil(rows / each) + rows * (1 + _AGAIN * share)
        peak = kept.peak(each, again)
        return _Plan(peak <= free * _RESERVE, time, peak, each, again)

    def all_again(self) -> bool:
        """Has every block computed again; whether that changes anything."""
        changed = len(self.again) < len(self.blocks)
        self.again = set(range(len(self.blocks)))
        return changed
