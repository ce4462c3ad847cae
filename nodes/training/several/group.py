"""The processes of a training, seen from the server: starting them, messages, and their end."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any

from ... import host

Message = tuple[Any, ...]  # its kind, and values of Python alone

LOG = "log.txt"  # in the job's folder: what the processes print
_SUPERVISOR = Path(__file__).resolve().parents[3] / "workers" / "supervisor.py"
_END_PATIENCE = 10.0  # seconds until processes that do not end are killed
_LOOK = 0.2  # seconds that they are waited for at once
_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)


class Group:
    """Processes that torchrun has started for a job, each with a connection to the server.

    Args:
        size: how many.
        job: a folder with what they need.
    """

    def __init__(self, size: int, job: Path) -> None:
        self.size, self._job = size, job
        self._key = secrets.token_bytes(32)
        self._listener = Listener(authkey=self._key)
        self._lines: dict[Connection[Any, Any], int] = {}  # with the rank of the process; -1 until it has said it
        self._closing = False
        self._acceptor = threading.Thread(target=self._accept, name="AC-LoRA workers", daemon=True)
        self._acceptor.start()
        self._pids: dict[int, int] = {}  # by rank
        self._supervisor = self._start()

    def messages(self, timeout: float) -> Iterator[tuple[int, Message]]:
        """Yield the messages that have come, each with the rank of its process, after waiting for one."""
        lines = dict(self._lines)
        if not lines:
            time.sleep(timeout)
        for line in wait(list(lines), timeout):
            assert isinstance(line, Connection)
            try:
                message = line.recv()
            except (EOFError, OSError):
                rank = self._lines.pop(line, -1)
                yield rank, ("gone",)
                continue
            if message[0] == "here":
                self._lines[line], self._pids[message[1]] = message[1], message[2]
            yield self._lines[line], message

    def tell(self, *message: Any) -> None:
        """Send a message to all processes."""
        for line in list(self._lines):
            with suppress(OSError):  # it has ended, which is noticed elsewhere
                line.send(message)

    @property
    def ended(self) -> bool:
        """Whether all processes have ended."""
        return self._supervisor.poll() is not None

    def failures(self) -> list[tuple[int, int]]:
        """Return the rank and the exit code of each process that has failed, those that were ended by torchrun last."""
        try:
            found = json.loads((self._job / "failures.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        return sorted(((rank, code) for rank, code in found), key=lambda pair: pair[1] == -signal.SIGTERM)

    def end(self) -> None:
        """End all processes, and return once they have ended; one that does not end is killed."""
        self._closing = True
        with suppress(OSError):
            Client(self._listener.address, authkey=self._key).close()  # wakes the thread that accepts
        self._listener.close()
        self.tell("end")
        assert self._supervisor.stdin is not None
        with suppress(OSError):
            self._supervisor.stdin.close()
        patience = time.monotonic() + _END_PATIENCE
        while self._lines and time.monotonic() < patience:
            for _ in self.messages(_LOOK):  # a line that closes leaves self._lines
                pass
        for line, rank in self._lines.items():
            if rank in self._pids:
                with suppress(OSError):
                    os.kill(self._pids[rank], _KILL)
            line.close()
        try:
            self._supervisor.wait(_END_PATIENCE)
        except subprocess.TimeoutExpired:
            self._supervisor.kill()

    def _start(self) -> subprocess.Popen[bytes]:
        given = {
            "address": self._listener.address,
            "key": self._key.hex(),
            "job": str(self._job),
            "comfyui": str(host.comfyui_folder()),
            "gpus": host.gpu_count() > 0,
        }
        environment = {**os.environ, "ACLORA_WORKERS": json.dumps(given), "PYTHONUTF8": "1"}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.size)))
        if sys.flags.no_user_site:  # as ComfyUI's portable Python is started
            environment["PYTHONNOUSERSITE"] = "1"
        if sys.platform == "linux":  # all are on this machine, whose name may lead to an address that is blocked
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        command = [sys.executable, str(_SUPERVISOR), str(self.size), str(self._job)]
        with (self._job / LOG).open("wb") as log:
            # Ctrl-C in the server's terminal is the server's: it ends these.
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def _accept(self) -> None:
        while not self._closing:
            try:
                line = self._listener.accept()
            except Exception:  # closed, or somebody without the key
                time.sleep(_LOOK)
                continue
            if self._closing:
                line.close()
            else:
                self._lines[line] = -1
