"""What each block of a network needs: memory for what its backward pass reads, and time for its forward pass."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..storage import component_tensors, map_tensors, tensors_in
from .pace import paced

_CYCLES = 3e9  # of a GPU in a second, at most
_LONGEST_LAUNCH = 0.1  # seconds; it takes longer only where something is compiled
# Of each kind so many blocks are measured. The first may also allocate what is kept from then on.
_MEASURED_OF_A_KIND = 3

Compute = Callable[[], Any]


class BlockNeeds(NamedTuple):
    """What a block's forward pass saves for the backward pass, in bytes, and how long it takes, in seconds."""

    everything: int = 0
    costly: int = 0  # if it is recomputed selectively
    seconds: float = 0.0

    def plus(self, other: BlockNeeds) -> BlockNeeds:
        """Return what both calls need together."""
        return BlockNeeds(self.everything + other.everything, self.costly + other.costly, self.seconds + other.seconds)


class BlockMeasurement:
    """Measures the blocks of a network on a CUDA device while the network runs.

    Args:
        count: of the network's blocks.

    Attributes:
        blocks: what each block was found to need, the sum of all its calls.
    """

    def __init__(self, count: int) -> None:
        self.blocks = [BlockNeeds() for _ in range(count)]
        self._alike: dict[Hashable, list[BlockNeeds]] = defaultdict(list)

    def run(self, index: int, kind: Hashable, compute: Compute, compute_selectively: Compute) -> Any:
        """Compute a block and measure it; it needs what others of its kind do where enough of these were measured.

        Args:
            index: of the block.
            kind: equal for blocks with equal needs.
            compute: computes the block.
            compute_selectively: does so as for a block that is recomputed selectively.

        Returns:
            The block's output, without the activations behind it.
        """
        alike = self._alike[kind]
        if len(alike) < _MEASURED_OF_A_KIND:
            with paced(False):  # waiting would count as time of the block
                output, found = _measured(compute, compute_selectively)
            alike.append(found)
        else:
            with torch.no_grad():
                output = compute()
            output = _without_activations(output)
            # A launch that was interrupted made the GPU wait, so the shortest time is the right one.
            found = alike[-1]._replace(seconds=min(needs.seconds for needs in alike))
        self.blocks[index] = self.blocks[index].plus(found)  # a block may be called several times
        return output


def kind_of(block: nn.Module, given: Any) -> Hashable:
    """Return what tells blocks of different needs apart: their weights, what they are given, and which layers learn.

    given: the block's arguments, nested.
    """
    parts = [part for weight in block.parameters() for part in component_tensors(weight)]
    changed = tuple(name for name, part in block.named_modules() if "forward" in vars(part) or part._forward_hooks)
    return type(block), _facts(parts), _facts(tensors_in(given)), changed, torch.is_grad_enabled()


def _facts(tensors: Iterable[Tensor]) -> Hashable:
    return tuple((type(tensor), tensor.size(), tensor.dtype) for tensor in tensors)


def _measured(compute: Compute, compute_selectively: Compute) -> tuple[Any, BlockNeeds]:
    """Compute a block in both ways; return its output and its needs."""
    began = time.perf_counter()
    _, costly = _saved_bytes(compute_selectively)
    with _gpu_seconds(time.perf_counter() - began) as seconds:
        output, everything = _saved_bytes(compute)
    return output, BlockNeeds(everything, costly, seconds())


def _saved_bytes(compute: Compute) -> tuple[Any, int]:
    """Run a block; return its output, without the activations behind it, and how many bytes they took."""
    before = torch.cuda.memory_allocated()
    output = compute()
    taken = torch.cuda.memory_allocated() - before - sum(tensor.nbytes for tensor in tensors_in(output))
    return _without_activations(output), max(0, taken)


def _without_activations(output: Any) -> Any:
    """Return the output with its activations freed, as an input of the next block; copied, as that may add to it."""
    return map_tensors(output, lambda it: it.detach().requires_grad_().clone() if it.is_floating_point() else it)


@contextmanager
def _gpu_seconds(launching: float) -> Iterator[Callable[[], float]]:
    """Yield a function that returns, afterwards, how long the GPU computed.

    Args:
        launching: seconds in which all kernels are launched. The GPU begins when they are, as it would wait for the CPU
            between them otherwise, which it does not in a graph.
    """
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if sleep := getattr(torch.cuda, "_sleep", None):  # without it, the time of launching counts where it is longer
        sleep(int(min(launching, _LONGEST_LAUNCH) * _CYCLES))
    began.record()
    yield lambda: began.elapsed_time(ended) / 1000
    ended.record()
    ended.synchronize()
