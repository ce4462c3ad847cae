"""Activation checkpointing of chosen blocks, and what each block saves by it.

A step needs most of its memory for the activations that its backward pass reads. A block of the network can discard
its own and recompute them when they are needed (Chen et al. 2016, arXiv 1604.06174), at a third more time, or at less
if it keeps some of them (selective_checkpointing.py). Which blocks do is planned in step_plan.py.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import selective_checkpointing
from .block_measurement import BlockMeasurement, kind_of
from .inplace import NoInplaceAdd
from .layers import is_linear
from .out_of_memory import out_of_memory_named
from .pace import keep_pace, paced
from .step_plan import ActivationSizes, StepPlan

log = logging.getLogger("aclora")


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
        self._measurement: BlockMeasurement | None = None  # while blocks are measured

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
            if self._measurement is not None:
                return self._measure_block(self._measurement, index, compute, args, kwargs)
            if index in self.recomputed | self.required and torch.is_grad_enabled():
                return self._checkpointed(compute, args, kwargs, index in self.selective)
            return compute(*args, **kwargs)

        return forward

    def _checkpointed(self, compute: Callable[..., Any], args: Any, kwargs: Any, selective: bool) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            keep_pace()
            # Recomputation runs in another thread, which does not know the modes of the forward pass.
            with NoInplaceAdd() if self.no_inplace_add else nullcontext():
                return compute(*args, **kwargs)

        how: Any = {"context_fn": selective_checkpointing.contexts} if selective else {}
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **how, **kwargs)

    def _measure_block(
        self, measurement: BlockMeasurement, index: int, compute: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        return measurement.run(
            index,
            kind_of(self.blocks[index], (args, kwargs)),
            lambda: compute(*args, **kwargs),
            lambda: self._checkpointed(compute, args, kwargs, bool(self.selective)),
        )

    def measure(self, loss: Callable[[], Tensor], in_pace: bool = False) -> ActivationSizes:
        """Measure what a step of one row needs. The caller clears the gradients.

        Args:
            loss: computes the loss of one row with gradients enabled, on a CUDA device.
            in_pace: whether eager steps will be paced (pace.py).

        Raises:
            torch.cuda.OutOfMemoryError: one row does not fit, though every block is recomputed.
        """
        chosen = self.recomputed, self.selective
        try:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            tensors, memory = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
            with paced(in_pace):
                self._step_recomputed(loss)
            torch.cuda.synchronize()
            used = torch.cuda.max_memory_allocated() - tensors
            least = max(used, torch.cuda.max_memory_reserved() - memory)
            self._measurement = BlockMeasurement(len(self.blocks))
            with paced(in_pace):
                loss()
            needs = self._measurement.blocks
            return ActivationSizes(
                blocks=[block.everything for block in needs],
                least=least,
                used=used,
                costly=[block.costly for block in needs] if self.selective else [],
                forward=[block.seconds for block in needs],
            )
        finally:
            (self.recomputed, self.selective), self._measurement = chosen, None

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


def _works(loss: Callable[[], Tensor]) -> bool:
    """Take a step, and return whether the network allows that operations are watched."""
    try:
        with out_of_memory_named():
            loss().backward()
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a network does then
        log.info("AC-LoRA: recomputed blocks keep nothing (%s).", str(error).split("\n")[0])
        traceback.clear_frames(error.__traceback__)  # until then the block that failed watches all operations
        return False
    return True
