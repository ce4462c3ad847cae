"""Activation checkpointing that is sized to the free GPU memory.

A step needs most of its memory for the activations that its backward pass reads. A block of the network can discard
its own and recompute them when they are needed (Chen et al. 2016, arXiv 1604.06174), at a third more time.
Alternatively the rows of a step are split into micro-batches, whose gradients add up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..storage import map_tensors, tensors_in
from .inplace import NoInplaceAdd
from .layers import is_linear

_USABLE = 0.9  # share of the free memory to plan for: libraries need some, and allocators leave gaps

# Times in units of one row's: of each micro-batch, and of recomputing all blocks for a row. Measured for SDXL at 1024²
# on an H100 (bench/README.md): 59 ms for one row and 182 for four; with all blocks recomputed 82 and 252.
_MICRO_BATCH_TIME, _RECOMPUTE_TIME = 0.45, 0.38


@dataclass(frozen=True)
class ActivationSizes:
    """What a step of one row needs: memory in bytes, and time."""

    blocks: list[int]  # activations that each block saves for the backward pass
    least: int  # a step that recomputes every block, with the gaps that the allocator leaves
    used: int  # of that by tensors at its peak
    seconds: float = 0.0  # that such a step took, launched kernel by kernel; 0 if not measured

    def peak(self, rows: int, recomputed: set[int]) -> int:
        """Return the peak memory of a step in bytes.

        Args:
            rows: the number of rows in a micro-batch.
            recomputed: indices of the blocks that are recomputed.
        """
        saved = sum(size for index, size in enumerate(self.blocks) if index not in recomputed)
        return rows * (self.least + saved)


class _Plan(NamedTuple):
    """A way to run a step."""

    fits: bool
    time: float  # in units of one row's
    peak: int  # bytes
    rows: int  # of a micro-batch
    recomputed: set[int]  # indices of blocks


def find_blocks(network: nn.Module) -> list[nn.Module]:
    """Return the smallest repeated parts of a network that hold at least two layers with weights, in order."""

    def layer_count(module: nn.Module) -> int:
        return sum(is_linear(part) or isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d) for part in module.modules())

    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    candidates = {id(part) for parts in lists for part in parts if layer_count(part) > 1}

    def holds_candidate(module: nn.Module) -> bool:
        return any(id(part) in candidates for part in module.modules() if part is not module)

    return [module for module in network.modules() if id(module) in candidates and not holds_candidate(module)]


class ActivationCheckpointing:
    """Recomputes chosen blocks of a network in the backward pass.

    Attributes:
        blocks: the blocks of the network that can be recomputed.
        recomputed: indices of the blocks that are recomputed.
        required: indices of those that have to be, as their weights are streamed.
        no_inplace_add: whether the network overwrites what its backward pass needs, so that in-place additions have to
            be replaced in recomputation too.
    """

    def __init__(self, network: nn.Module) -> None:
        self.blocks = [block for block in find_blocks(network) if "forward" not in vars(block)]
        self.recomputed: set[int] = set()
        self.required: set[int] = set()
        self.no_inplace_add = False
        self._measured: list[int] | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Wrap the blocks' forwards, which then obey `recomputed`; restored on exit."""
        with ExitStack() as undo:
            for index, block in enumerate(self.blocks):
                block.forward = self._wrapped(index, block.forward)
                undo.callback(delattr, block, "forward")
            yield

    def _wrapped(self, index: int, compute: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._measured is not None:
                return self._measure_block(index, compute, args, kwargs)
            if index in self.recomputed | self.required and torch.is_grad_enabled():
                return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
            return compute(*args, **kwargs)

        def run(*args: Any, **kwargs: Any) -> Any:
            # Recomputation runs in another thread, which does not know the modes of the forward pass.
            with NoInplaceAdd() if self.no_inplace_add else nullcontext():
                return compute(*args, **kwargs)

        return forward

    def _measure_block(self, index: int, compute: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        assert self._measured is not None
        before = torch.cuda.memory_allocated()
        output = compute(*args, **kwargs)
        output_bytes = sum(tensor.nbytes for tensor in tensors_in(output))
        self._measured[index] += max(0, torch.cuda.memory_allocated() - before - output_bytes)
        # Detached, so that the block's activations are freed before the next block runs.
        return map_tensors(output, lambda it: it.detach().requires_grad_() if it.is_floating_point() else it)

    def measure(self, loss: Callable[[], Tensor]) -> ActivationSizes:
        """Measure what a step of one row needs. The caller clears the gradients.

        Args:
            loss: computes the loss of one row with gradients enabled, on a CUDA device.

        Raises:
            torch.cuda.OutOfMemoryError: one row does not fit, though every block is recomputed.
        """
        chosen, self.recomputed = self.recomputed, set(range(len(self.blocks)))
        try:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            tensors, memory = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
            torch.cuda.synchronize()
            began = time.perf_counter()
            loss().backward()
            torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            used = torch.cuda.max_memory_allocated() - tensors
            least = max(used, torch.cuda.max_memory_reserved() - memory)
            self._measured = [0] * len(self.blocks)
            loss()
            return ActivationSizes(self._measured, least, used, seconds)
        finally:
            self.recomputed, self._measured = chosen, None

    @staticmethod
    def room(peak: int) -> int:
        """Return how many bytes have to be free for a step with such a peak."""
        return math.ceil(peak / _USABLE)

    def fit(self, sizes: ActivationSizes, rows: int, free: int) -> tuple[int, int]:
        """Choose the blocks to recompute so that a step fits in the free memory and takes the least time.

        Args:
            sizes: from measure.
            rows: the number of rows of a step.
            free: free memory in bytes.

        Returns:
            The expected peak in bytes, and the rows of a micro-batch: all, unless fewer are faster or only they fit.
        """
        plans = [self._plan(sizes, rows, micro_batches, free) for micro_batches in range(1, rows + 1)]
        best = min(plans, key=lambda plan: (not plan.fits, plan.time if plan.fits else plan.peak))
        self.recomputed = best.recomputed
        return best.peak, best.rows

    def _plan(self, sizes: ActivationSizes, rows: int, micro_batches: int, free: int) -> _Plan:
        """Recompute as few blocks as possible, the largest first, with equal micro-batches."""
        rows_each = math.ceil(rows / micro_batches)
        recomputed = set(self.required)
        for index in sorted(set(range(len(self.blocks))) - recomputed, key=lambda index: -sizes.blocks[index]):
            if self.room(sizes.peak(rows_each, recomputed)) <= free:
                break
            recomputed.add(index)
        share = sum(sizes.blocks[index] for index in recomputed) / max(1, sum(sizes.blocks))
        time = _MICRO_BATCH_TIME * math.ceil(rows / rows_each) + rows * (1 + _RECOMPUTE_TIME * share)
        peak = sizes.peak(rows_each, recomputed)
        return _Plan(self.room(peak) <= free, time, peak, rows_each, recomputed)

    def recompute_all(self) -> bool:
        """Recompute every block from now on, and return whether that changes anything."""
        changed = len(self.recomputed | self.required) < len(self.blocks)
        self.recomputed = set(range(len(self.blocks)))
        return changed
