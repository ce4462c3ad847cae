"""Activation checkpointing of chosen blocks, and what each block saves by it.

A step needs most of its memory for the activations that its backward pass reads. A block of the network can discard
its own and recompute them when they are needed (Chen et al. 2016, arXiv 1604.06174), at a third more time, or at less
if it keeps some of them (selective_checkpointing.py). Which blocks do is planned in step_plan.py.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..storage import map_tensors, tensors_in
from . import selective_checkpointing
from .inplace import NoInplaceAdd
from .layers import is_linear
from .step_plan import ActivationSizes, StepPlan

log = logging.getLogger("aclora")

_CYCLES = 3e9  # of a GPU in a second, at most
_LONGEST_LAUNCH = 0.1  # seconds; it takes longer only where something is compiled


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
        self._measured: list[_Measured] | None = None

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
        began = time.perf_counter()
        _, costly = _saved_bytes(lambda: self._checkpointed(compute, args, kwargs, bool(self.selective)))
        with _gpu_seconds(time.perf_counter() - began) as seconds:
            output, everything = _saved_bytes(lambda: compute(*args, **kwargs))
        before = self._measured[index]  # of an earlier call of the block
        self._measured[index] = _Measured(
            before.everything + everything, before.costly + costly, before.seconds + seconds()
        )
        return output

    def measure(self, loss: Callable[[], Tensor]) -> ActivationSizes:
        """Measure what a step of one row needs. The caller clears the gradients.

        Args:
            loss: computes the loss of one row with gradients enabled, on a CUDA device.

        Raises:
            torch.cuda.OutOfMemoryError: one row does not fit, though every block is recomputed.
        """
        chosen = self.recomputed, self.selective
        try:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            tensors, memory = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
            self._step_recomputed(loss)
            torch.cuda.synchronize()
            used = torch.cuda.max_memory_allocated() - tensors
            least = max(used, torch.cuda.max_memory_reserved() - memory)
            self._measured = [_Measured() for _ in self.blocks]
            loss()
            return ActivationSizes(
                blocks=[block.everything for block in self._measured],
                least=least,
                used=used,
                costly=[block.costly for block in self._measured] if self.selective else [],
                forward=[block.seconds for block in self._measured],
            )
        finally:
            (self.recomputed, self.selective), self._measured = chosen, None

    def _step_recomputed(self, loss: Callable[[], Tensor]) -> None:
        """Take a step that recomputes every block, one of each kind selectively if the network allows that."""
        self.recomputed = set(range(len(self.blocks)))
        self.selective = set({type(block): index for index, block in enumerate(self.blocks)}.values())
        if not _works(loss):
            self.selective = set()
            loss().backward()

    def use(self, plan: StepPlan) -> None:
        """Recompute from now on what a plan recomputes."""
        self.recomputed, self.selective = plan.recomputed, plan.selective

    def recompute_all(self) -> bool:
        """Recompute every block from now on, all of it, and return whether that changes anything."""
        changed = bool(self.selective) or len(self.recomputed | self.required) < len(self.blocks)
        self.recomputed, self.selective = set(range(len(self.blocks))), set()
        return changed


class _Measured(NamedTuple):
    """What a block's forward pass saves for the backward pass, in bytes, and how long it takes."""

    everything: int = 0
    costly: int = 0  # if it is recomputed selectively
    seconds: float = 0.0


def _works(loss: Callable[[], Tensor]) -> bool:
    """Take a step, and return whether the network allows that operations are watched."""
    try:
        loss().backward()
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a network does then
        log.info("AC-LoRA: recomputed blocks keep nothing (%s).", str(error).split("\n")[0])
        traceback.clear_frames(error.__traceback__)  # until then the block that failed watches all operations
        return False
    return True


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


def _saved_bytes(compute: Callable[[], Any]) -> tuple[Any, int]:
    """Run a block; return its output, without the activations behind it, and how many bytes they took."""
    before = torch.cuda.memory_allocated()
    output = compute()
    taken = torch.cuda.memory_allocated() - before - sum(tensor.nbytes for tensor in tensors_in(output))
    # Detached, so that the activations are freed before the next block runs; copied, as networks add to it in place.
    detached = map_tensors(output, lambda it: it.detach().requires_grad_().clone() if it.is_floating_point() else it)
    return detached, max(0, taken)
