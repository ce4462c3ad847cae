"""The connection of a worker to ComfyUI's server, which has started it; it ends with the server."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from multiprocessing.connection import Client, Connection
from typing import Any

Message = tuple[Any, ...]  # its kind, and values of Python alone


class Line:
    """Messages to the server and from it. Without the server this process ends at once, whatever it is doing.

    Args:
        address, key: of the server's listener.
        rank: of this process.
    """

    def __init__(self, address: Any, key: bytes, rank: int) -> None:
        self._connection: Connection[Message, Message] = Client(address, authkey=key)
        self.rank = rank
        self._lock = threading.Lock()
        self._handle: Callable[[Message], None] | None = None
        self._early: list[Message] = []  # that came before they could be handled
        self.send("here", rank, os.getpid())
        threading.Thread(target=self._listen, name="AC-LoRA line", daemon=True).start()

    def send(self, *message: Any) -> None:
        """Send a message, from any thread; do nothing where the server has ended, as this process ends then."""
        try:
            with self._lock:
                self._connection.send(message)
        except OSError:
            os._exit(1)

    def attach(self, handle: Callable[[Message], None]) -> None:
        """Have messages handled in another thread, also those that have come before."""
        with self._lock:
            early, self._early, self._handle = self._early, [], handle
        for message in early:
            handle(message)

    def _listen(self) -> None:
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                message = ("end",)
            if message[0] == "end":
                os._exit(1)
            with self._lock:
                handle = self._handle
                if handle is None:
                    self._early.append(message)
            if handle is not None:
                handle(message)
