"""A ComfyUI server on a free port, and requests to it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any
from urllib.error import URLError
from urllib.request import ProxyHandler, Request, build_opener

from launcher.console import StepError

START_PATIENCE = 240.0  # seconds; the first start compiles Python files, perhaps on a slow disk
STOP_PATIENCE = 15.0  # seconds
# Requests to this machine must not go through a proxy that is set for the internet.
HTTP = build_opener(ProxyHandler({}))


def free_port(wanted: int = 0) -> int:
    """Return the wanted port if it is free, or else any free port."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise StepError("Starting ComfyUI", "no port is free on 127.0.0.1.", "Close other servers and try again.")


# glibc keeps freed blocks up to a size that grows while the program runs; a fixed size makes memory comparable.
COMPARABLE_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "2"}


class Server:
    """A running ComfyUI, as a context manager.

    Args:
        folder: holds ComfyUI's main.py.
        python: runs it.
        options: further command-line arguments.
        log: file for its output; None shows the output in the terminal.
        port: wanted port; another is taken if it is in use.
        environment: variables in addition to those of this process.
    """

    def __init__(
        self,
        folder: Path,
        python: Path,
        options: Sequence[str],
        log: Path | None,
        port: int = 0,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.log, self.port = log, free_port(port)
        self.address = f"http://127.0.0.1:{self.port}"
        self.folder, self.environment = folder, environment
        self.command = [
            str(python),
            str(folder / "main.py"),
            "--listen",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--disable-auto-launch",
            *options,
        ]
        self.process: subprocess.Popen[bytes] | None = None
        self.output: IO[bytes] | None = None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and wait until it answers."""
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self.output = self.log.open("wb")
        env = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", **self.environment}
        self.process = subprocess.Popen(
            self.command,
            cwd=self.folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT if self.output else None,
        )
        try:
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def wait_until_ready(self) -> None:
        """Wait until the server answers. Raise StepError if it ends or does not answer in time."""
        assert self.process is not None
        until = time.monotonic() + START_PATIENCE
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise self.failure(f"it ended with exit code {self.process.returncode}.")
            try:
                self.get("/system_stats", timeout=5)
                return
            except (URLError, OSError):
                time.sleep(0.2)
        raise self.failure(f"it did not answer within {START_PATIENCE:.0f} seconds.")

    def failure(self, reason: str) -> StepError:
        """Return a StepError with the last lines of the log."""
        lines = [reason]
        if self.log is not None:
            lines += self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
        hint = "The last lines above say why. If packages are missing, delete the folder .runtime/venv and start again."
        if self.log is not None:
            hint += f"\nThe whole log: {self.log}"
        return StepError("Starting ComfyUI", "\n".join(lines), hint)

    def stop(self) -> None:
        """Stop the server; safe to call twice."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.output is not None:
            self.output.close()
            self.output = None

    def get(self, path: str, timeout: float = 30) -> bytes:
        """Return the body of a page. Raise urllib.error.HTTPError for any status but 200."""
        with HTTP.open(self.address + path, timeout=timeout) as answer:
            return bytes(answer.read())

    def get_json(self, path: str) -> Any:
        """Return the parsed JSON of a page."""
        return json.loads(self.get(path))

    def post_json(self, path: str, data: object) -> Any:
        """Send JSON and return the parsed answer, or None if it is empty."""
        request = Request(self.address + path, json.dumps(data).encode(), {"Content-Type": "application/json"})
        with HTTP.open(request, timeout=30) as answer:
            body = answer.read()
        return json.loads(body) if body else None

    def node(self, kind: str, **inputs: Any) -> dict[str, Any]:
        """Return a node of a prompt, with defaults for the inputs that are not given."""
        found = self.get_json(f"/object_info/{kind}")[kind]["input"]
        specs = {**found.get("required", {}), **found.get("optional", {})}
        defaults = {name: spec[1]["default"] for name, spec in specs.items() if "default" in (spec[1:] or ({},))[0]}
        return {"class_type": kind, "inputs": defaults | inputs}
