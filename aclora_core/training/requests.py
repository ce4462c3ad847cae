"""What a user asks of a training while it runs: images, or its LoRA as a file, of the step at which it is."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock
from typing import Literal

from .progress import Result

RequestKind = Literal["sample", "save"]


class Requests:
    """Requests from other threads to one training, which looks at them between two steps.

    Args:
        save: called in the thread of the training with what it would return now; returns a sentence for the user.
    """

    def __init__(self, save: Callable[[Result], str]) -> None:
        self.save = save
        self._lock = Lock()
        self._open: dict[RequestKind, Future[str]] = {}
        self._ended = ""

    def ask(self, kind: RequestKind) -> Future[str]:
        """Ask for something, from any thread. Asked again before it is done, it is done once.

        Returns what becomes a sentence for the user. Nobody may cancel it.
        """
        with self._lock:
            if kind not in self._open:
                self._open[kind] = Future()
                if self._ended:
                    self._open[kind].set_result(self._ended)
            return self._open[kind]

    def is_open(self, kind: RequestKind) -> bool:
        """Return whether something is asked for and not done yet."""
        return kind in self._open

    def answer(self, kind: RequestKind, sentence: str) -> None:
        """Tell those who have asked what became of it."""
        with self._lock:
            self._open.pop(kind).set_result(sentence)

    def end(self, sentence: str) -> None:
        """Answer everything that is open, and whatever is asked later, as the training has ended."""
        with self._lock:
            self._ended = sentence
            for future in self._open.values():
                if not future.done():
                    future.set_result(sentence)
