"""Activation checkpointing that is sized to the free GPU memory.

A step needs most of its memory for the activations that its backward pass reads. A block of the network can discard
its own and recompute them when they are needed (Chen et al. 2016, arXiv 1604.06174), at a third more time, or at less
if it keeps some of them (selective_checkpointing.py). Alternatively the rows of a step are split into micro-batches,
whose gradients add up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..storage import map_tensors, tensors_in
from . import selective_checkpointing
from .inplace import NoInplaceAdd
from .layers import is_linear

_USABLE = 0.9  # share of the free memory to plan for: libraries need some, and allocators leave gaps

# Times in units of one row's: of each micro-batch, and of recomputing all blocks for a row. Measured for SDXL at 1024²
# on an H100 (bench/README.md): 59 ms for one row and 182 for four; with all blocks recomputed 82 and 252.
_MICRO_BATCH_TIME, _RECOMPUTE_TIME = 0.45, 0.38
_SELECTIVE = (
    0.6  # of the time to recompute a block that keeps its costly outputs; measured for Flux.1 (bench/README.md)
)
_ENQUEUED = 0.8  # of a step's time: in less, the GPU has been given all work of a step that it does not wait for


@dataclass(frozen=True)
class ActivationSizes:
    """What a step of one row needs: memory in bytes, and time."""

    blocks: list[int]  # activations that each block saves for the backward pass
    least: int  # a step that recomputes every block, with the gaps that the allocator leaves
    used: int  # of that by tensors at its peak
    seconds: float = 0.0  # that such a step took, launched kernel by kernel; 0 if not measured
    gpu_bound: bool = False  # whether that is the GPU's time, and not the CPU's that launches
    costly: list[int] = field(default_factory=list)  # of what each block saves, if it is recomputed selectively

    def peak(self, rows: int, recomputed: set[int], selective: Set[int] = frozenset()) -> int:
        """Return the peak memory of a step in bytes.

        Args:
            rows: the number of rows in a micro-batch.
            recomputed: indices of the blocks that are recomputed.
            selective: indices of those that keep their costly outputs.
        """
        saved = sum(size for index, size in enumerate(self.blocks) if index not in recomputed)
        saved += sum(self.costly[index] for index in recomputed & selective)
        return rows * (self.least + saved)


class _Plan(NamedTuple):
    """A way to run a step."""

    fits: bool
    time: float  # in units of one row's
    peak: int  # bytes
    rows: int  # of a micro-batch
    recomputed: set[int]  # indices of blocks
    selective: set[int]


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
        selective: indices of blocks that, if they are recomputed, keep their costly outputs.
        no_inplace_add: whether the network overwrites what its backward pass needs, so that in-place additions have to
            be replaced in recomputation too.
    """

    def __init__(self, network: nn.Module) -> None:
        self.blocks = [block for block in find_blocks(network) if "forward" not in vars(block)]
        self.recomputed: set[int] = set()
        self.required: set[int] = set()
        self.selective: set[int] = set()
        self.no_inplace_add = False
        self._measured: list[_Saved] | None = None

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
                return self._checkpointed(compute, args, kwargs, index in self.selective)
            return compute(*args, **kwargs)

        return forward

    def _checkpointed(self, compute: Callable[..., Any], args: Any, kwargs: Any, selective: bool) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            # Recomputation runs in another thread, which does not know the modes of the forward pass.
            with NoInplaceAdd() if self.no_inplace_add else nullcontext():
                return compute(*args, **kwargs)

        how: Any = {"context_fn": selective_checkpointing.contexts} if selective else {}
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **how, **kwargs)

    def _measure_block(self, index: int, compute: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        assert self._measured is not None
        _, costly = _saved_bytes(lambda: self._checkpointed(compute, args, kwargs, selective=True))
        output, everything = _saved_bytes(lambda: compute(*args, **kwargs))
        before = self._measured[index]  # of an earlier call of the block
        self._measured[index] = _Saved(before.everything + everything, before.costly + costly)
        return output

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
            enqueued = time.perf_counter() - began
            torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            used = torch.cuda.max_memory_allocated() - tensors
            least = max(used, torch.cuda.max_memory_reserved() - memory)
            self._measured = [_Saved() for _ in self.blocks]
            loss()
            everything = [saved.everything for saved in self._measured]
            costly = [saved.costly for saved in self._measured]
            return ActivationSizes(everything, least, used, seconds, enqueued < _ENQUEUED * seconds, costly)
        finally:
            self.recomputed, self._measured = chosen, None

    @staticmethod
    def room(peak: int) -> int:
        """Return how many bytes have to be free for a step with such a peak."""
        return math.ceil(peak / _USABLE)

    def fit(self, sizes: ActivationSizes, rows: int, free: int, spare: bool = False) -> tuple[int, int]:
        """Choose the blocks to recompute so that a step fits in the free memory and takes the least time.

        Args:
            sizes: from measure.
            rows: the number of rows of a step.
            free: free memory in bytes.
            spare: keep nothing of recomputed blocks, to leave more memory for other uses.

        Returns:
            The expected peak in bytes, and the rows of a micro-batch: all, unless fewer are faster or only they fit.
        """
        plans = [self._plan(sizes, rows, micro_batches, free, spare) for micro_batches in range(1, rows + 1)]
        best = min(plans, key=lambda plan: (not plan.fits, plan.time if plan.fits else plan.peak))
        self.recomputed, self.selective = best.recomputed, best.selective
        return best.peak, best.rows

    def _plan(self, sizes: ActivationSizes, rows: int, micro_batches: int, free: int, spare: bool) -> _Plan:
        """Recompute as few blocks as possible, the largest first, with equal micro-batches.

        As many of these as possible keep their costly outputs, as nothing else saves so much time for its memory.
        """
        rows_each = math.ceil(rows / micro_batches)
        recomputed = set(self.required)
        selective = set() if spare else {index for index, size in enumerate(sizes.costly) if size}

        def fits() -> bool:
            return self.room(sizes.peak(rows_each, recomputed, selective)) <= free

        for index in _largest_first(sizes.blocks, set(range(len(self.blocks))) - recomputed):
            if fits():
                break
            recomputed.add(index)
        for index in _largest_first(sizes.costly, set(selective)):
            if fits():
                break
            selective.remove(index)
        selective &= recomputed
        whole, in_part = (sum(sizes.blocks[index] for index in part) for part in (recomputed - selective, selective))
        share = (whole + _SELECTIVE * in_part) / max(1, sum(sizes.blocks))
        time = _MICRO_BATCH_TIME * math.ceil(rows / rows_each) + rows * (1 + _RECOMPUTE_TIME * share)
        return _Plan(fits(), time, sizes.peak(rows_each, recomputed, selective), rows_each, recomputed, selective)

    def recompute_all(self) -> bool:
        """Recompute every block from now on, all of it, and return whether that changes anything."""
        changed = bool(self.selective) or len(self.recomputed | self.required) < len(self.blocks)
        self.recomputed, self.selective = set(range(len(self.blocks))), set()
        return changed


class _Saved(NamedTuple):
    """Bytes of activations that a block saves for the backward pass."""

    everything: int = 0
    costly: int = 0  # if it is recomputed selectively


def _saved_bytes(compute: Callable[[], Any]) -> tuple[Any, int]:
    """Run a block; return its output, without the activations behind it, and how many bytes they took."""
    before = torch.cuda.memory_allocated()
    output = compute()
    taken = torch.cuda.memory_allocated() - before - sum(tensor.nbytes for tensor in tensors_in(output))
    # Detached, so that the activations are freed before the next block runs.
    detached = map_tensors(output, lambda it: it.detach().requires_grad_() if it.is_floating_point() else it)
    return detached, max(0, taken)


def _largest_first(sizes: Sequence[int], indices: Set[int]) -> list[int]:
    return sorted(indices, key=lambda index: -sizes[index])
