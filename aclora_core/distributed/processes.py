"""The processes that train one adapter: sums of tensors, decisions that all share, and failures that reach all.

Every process runs the same program on the same data and takes its share of the work. What they exchange besides
gradients begins with a vote, in which a process that failed says so. So whatever the others wait for, they learn of
it, and a process that has ended is noticed by its closed connection. In the same way the first process can call the
others, who wait for it, to help.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..text import error_reason

_Item = TypeVar("_Item")
_NO, _YES, _CALLED, _FAILED = range(4)  # votes; the largest counts


class OtherProcessError(RuntimeError):
    """Another process has failed or ended, so the training cannot go on."""


class Processes:
    """This process among those of a training.

    Args:
        rank: of this process, from 0. The first writes files and draws.
        size: how many there are.
        control: torch's process group for decisions, which works on main memory; None if there is one process alone.
        data: the group for tensors on their device.
        idle: a group with more patience, in which the others wait for the first to give them work.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        control: dist.ProcessGroup | None = None,
        data: dist.ProcessGroup | None = None,
        idle: dist.ProcessGroup | None = None,
    ) -> None:
        self.rank, self.size = rank, size
        self._control, self._data, self._idle = control, data, idle
        self._help: Callable[[Any], None] | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and decides."""
        return self.rank == 0

    def share(self, items: Sequence[_Item]) -> Sequence[_Item]:
        """Return this process's part of items, which follow each other; the parts differ by one item at most."""
        return items[self.rank * len(items) // self.size : (self.rank + 1) * len(items) // self.size]

    def sum_(self, *tensors: Tensor) -> None:
        """Replace tensors by their sums over all processes, to the same bits in each.

        Raises:
            OtherProcessError: another process has failed or ended.
        """
        if self.size > 1:
            self._vote(_NO)
            with _told():
                for tensor in tensors:
                    dist.all_reduce(tensor, group=self._data)

    def copy_from_first_(self, tensor: Tensor) -> None:
        """Replace a tensor by that of the first process.

        Raises:
            OtherProcessError: another process has failed or ended.
        """
        if self.size > 1:
            self._vote(_NO)
            with _told(), torch.no_grad():
                dist.broadcast(tensor, 0, group=self._data)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process.

        Raises:
            OtherProcessError: another process has failed or ended.
        """
        return flag if self.size == 1 else self._vote(_YES if flag else _NO) == _YES

    def from_first(self, value: Any) -> Any:
        """Return the value of the first process; those of the others do not count.

        Raises:
            OtherProcessError: another process has failed or ended.
        """
        if self.size == 1:
            return value
        self._vote(_NO)
        return self._broadcast(value, self._control)

    def told_by_first(self, value: Any) -> Any:
        """Return the value of the first process, for which the others wait as long as it works on its own.

        Raises:
            OtherProcessError: another process has ended.
        """
        return value if self.size == 1 else self._broadcast(value, self._idle)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank.

        Raises:
            OtherProcessError: another process has failed or ended.
        """
        if self.size == 1:
            return [value]
        self._vote(_NO)
        return self._gather(value)

    @contextmanager
    def helping(self, help_with: Callable[[Any], None]) -> Iterator[None]:
        """Let the first process call this one for help while the block lasts, wherever it waits for the first.

        help_with: called with what the first process gives; must not raise.
        """
        self._help = help_with
        try:
            yield
        finally:
            self._help = None

    def call_for_help(self, argument: Any) -> None:
        """Have the other processes begin what `helping` was given. For the first process alone.

        Raises:
            OtherProcessError: another process has failed or ended.
        """
        if self.size > 1:
            self._vote(_CALLED)
            self._broadcast(argument, self._control)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Fail in all processes where the block fails in one, so that none of them waits for another.

        Raises:
            OtherProcessError: another process has failed or ended.
        """
        try:
            yield
        except OtherProcessError:
            raise
        except Exception as error:
            if self.size > 1:
                self._vote(_FAILED, error_reason(error))
            raise

    def _vote(self, vote: int, reason: str = "") -> int:
        """Return the largest vote of all processes; one that is called for help votes again after it.

        Raises:
            OtherProcessError: this process has not failed, but another has.
        """
        largest = self._largest(vote)
        while largest == _CALLED != vote:
            argument = self._broadcast(None, self._control)
            if self._help is not None:
                self._help(argument)
            largest = self._largest(vote)
        if largest == _FAILED:
            reasons = self._gather(reason)
            if vote != _FAILED:
                failed = next(rank for rank, each in enumerate(reasons) if each)
                raise OtherProcessError(f"Process {failed + 1} of {self.size} has failed: {reasons[failed]}")
        return largest

    def _largest(self, vote: int) -> int:
        votes = torch.tensor([vote])
        with _told():
            dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._control)
        return int(votes)

    def _gather(self, value: Any) -> list[Any]:
        values = [None] * self.size
        with _told():
            dist.all_gather_object(values, value, group=self._control)
        return values

    @staticmethod
    def _broadcast(value: Any, group: dist.ProcessGroup | None) -> Any:
        values = [value]
        with _told():
            dist.broadcast_object_list(values, 0, group=group)
        return values[0]


@contextmanager
def _told() -> Iterator[None]:
    """Say in a sentence that a connection has closed; which one torch knows only as an address."""
    try:
        yield
    except RuntimeError as error:
        raise OtherProcessError(
            "Another process of this training has ended, or has not answered for a long time. What it has said itself "
            "tells why; with checkpoints, the same command goes on from the last one."
        ) from error


ALONE = Processes()
