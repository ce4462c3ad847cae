"""How a step fits into memory in the least time: which blocks are recomputed, and how many rows go through at a time.

Times are those of the GPU, from the forward passes of the blocks. Copies of streamed weights run beside the computing,
so a pass takes the longer of the two; those from memory that is not pinned do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import NamedTuple

_USABLE = 0.9  # share of the free memory that a step may take: libraries need some, and allocators leave gaps

# In units of the forward pass, measured on an H100 and an H200 (bench/README.md).
_BACKWARD = 1.4  # the backward pass, without recomputing: 1.27 for Flux.1, 1.65 for SDXL
_MICRO_BATCH = 0.45  # more per micro-batch, in rows: SDXL takes 59 ms for one row and 182 for four
_SELECTIVE = 0.6  # recomputing a block that keeps its costly outputs, for Flux.1


@dataclass(frozen=True)
class ActivationSizes:
    """What a step of one row needs: memory in bytes, and time."""

    blocks: list[int]  # activations that each block saves for the backward pass
    least: int  # a step that recomputes every block, with the gaps that the allocator leaves
    used: int  # of that by tensors at its peak
    costly: list[int] = field(default_factory=list)  # of what each block saves, if it is recomputed selectively
    forward: list[float] = field(default_factory=list)  # seconds of the GPU for each block's forward pass

    def peak(self, rows: int, recomputed: Set[int], selective: Set[int] = frozenset()) -> int:
        """Return the peak memory of a step in bytes.

        Args:
            rows: the number of rows in a micro-batch.
            recomputed: indices of the blocks that are recomputed.
            selective: indices of those that keep their costly outputs.
        """
        saved = sum(size for index, size in enumerate(self.blocks) if index not in recomputed)
        saved += sum(self.costly[index] for index in recomputed & selective)
        return rows * (self.least + saved)

    @property
    def times(self) -> list[float]:
        """Seconds of each block's forward pass; equal shares of 1 where they were not measured."""
        return self.forward or [1 / len(self.blocks) for _ in self.blocks]


class Copies(NamedTuple):
    """Copies of streamed weights in each pass."""

    seconds: float = 0.0
    beside: bool = True  # whether they run beside the computing

    def and_computing(self, seconds: float) -> float:
        """Return the seconds that a pass takes which computes for so many."""
        return max(seconds, self.seconds) if self.beside else seconds + self.seconds


NO_COPIES = Copies()


class StepPlan(NamedTuple):
    """A way to run a step."""

    fits: bool
    seconds: float
    peak: int  # bytes
    rows: int  # of a micro-batch
    recomputed: set[int]  # indices of blocks
    selective: set[int]  # indices of recomputed blocks that keep their costly outputs


def best_plan(
    sizes: ActivationSizes, rows: int, free: int, required: Set[int] = frozenset(), copies: Copies = NO_COPIES
) -> StepPlan:
    """Choose the blocks to recompute so that a step fits in the free memory and takes the least time.

    Args:
        sizes: of one row.
        rows: the number of rows of a step. They go through in micro-batches where that is faster, or only they fit.
        free: free memory in bytes.
        required: indices of blocks that have to be recomputed.
        copies: of streamed weights.

    Returns:
        The plan; if none fits, that which needs least.
    """
    plans = [_plan(sizes, rows, micro_batches, free, required, copies) for micro_batches in range(1, rows + 1)]
    return min(plans, key=lambda plan: (not plan.fits, plan.seconds if plan.fits else plan.peak))


def _plan(
    sizes: ActivationSizes, rows: int, micro_batches: int, free: int, required: Set[int], copies: Copies
) -> StepPlan:
    """Recompute as few blocks as possible, the largest first, with equal micro-batches.

    As many of these as possible keep their costly outputs, as nothing else saves so much time for its memory.
    """
    rows_each = math.ceil(rows / micro_batches)
    recomputed, selective = set(required), {index for index, size in enumerate(sizes.costly) if size}

    def fits() -> bool:
        return room(sizes.peak(rows_each, recomputed, selective)) <= free

    for index in _largest_first(sizes.blocks, set(range(len(sizes.blocks))) - recomputed):
        if fits():
            break
        recomputed.add(index)
    for index in _largest_first(sizes.costly, selective):
        if fits():
            break
        selective.remove(index)
    return given_plan(sizes, rows, rows_each, free, recomputed, selective, copies)


def given_plan(
    sizes: ActivationSizes,
    rows: int,
    rows_each: int,
    free: int,
    recomputed: Set[int],
    selective: Set[int] = frozenset(),
    copies: Copies = NO_COPIES,
) -> StepPlan:
    """Return the plan with these blocks recomputed; arguments as in best_plan, and rows_each of a micro-batch."""
    selective = selective & recomputed
    forward = sum(sizes.times)
    again = sum(sizes.times[index] * (_SELECTIVE if index in selective else 1) for index in recomputed)
    growth = (rows_each + _MICRO_BATCH) / (1 + _MICRO_BATCH)
    each = copies.and_computing(growth * forward)
    each += copies.and_computing(growth * (_BACKWARD * forward + again))
    peak = sizes.peak(rows_each, recomputed, selective)
    seconds = math.ceil(rows / rows_each) * each
    return StepPlan(room(peak) <= free, seconds, peak, rows_each, set(recomputed), set(selective))


def room(peak: int) -> int:
    """Return how many bytes have to be free for a step with such a peak."""
    return math.ceil(peak / _USABLE)


def _largest_first(sizes: Sequence[int], indices: Set[int]) -> list[int]:
    return sorted(indices, key=lambda index: -sizes[index])
