"""Start ComfyUI's server on a free port, talk to it over HTTP, and stop it again."""

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

from launcher.console import StepFailed

START_PATIENCE = 240.0  # seconds; the first start compiles Python files and may meet a slow disk
STOP_PATIENCE = 15.0
# A proxy set for the world outside must not get requests for this machine.
HTTP = build_opener(ProxyHandler({}))


def free_port(wanted: int = 0) -> int:
    """The wanted port if it is free, else any that is."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise StepFailed("Starting ComfyUI", "no port is free on 127.0.0.1.", "Close other servers and try again.")


# glibc keeps freed blocks up to a size that grows as the program runs; with a fixed one, memory can be compared.
COMPARABLE_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "2"}


class Server:
    """A running ComfyUI, as a context manager.

    `log`: where its output goes; None shows it in the terminal. `options`: further words of its command line.
    `environment`: variables that it gets besides those of this program.
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
        """Start the server and return when it answers."""
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
        """Return when the server answers; raise StepFailed when it ends or stays silent."""
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

    def failure(self, reason: str) -> StepFailed:
        """A StepFailed with the last lines of the log."""
        lines = [reason]
        if self.log is not None:
            lines += self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
        cure = "The last lines above say why. If packages are missing, delete the folder .runtime/venv and start again."
        if self.log is not None:
            cure += f"\nThe whole log: {self.log}"
        return StepFailed("Starting ComfyUI", "\n".join(lines), cure)

    def stop(self) -> None:
        """End the server; safe to call twice."""
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
        """The body of a page. Raises urllib.error.HTTPError for any status but 200."""
        with HTTP.open(self.address + path, timeout=timeout) as answer:
            return bytes(answer.read())

    def get_json(self, path: str) -> Any:
        """A page that is JSON."""
        return json.loads(self.get(path))

    def post_json(self, path: str, data: object) -> Any:
        """Send JSON and read JSON (None for an empty answer)."""
        request = Request(self.address + path, json.dumps(data).encode(), {"Content-Type": "application/json"})
        with HTTP.open(request, timeout=30) as answer:
            body = answer.read()
        return json.loads(body) if body else None

    def node(self, kind: str, **inputs: Any) -> dict[str, Any]:
        """A node of a prompt; what is not given is as it comes."""
        found = self.get_json(f"/object_info/{kind}")[kind]["input"]
        specs = {**found.get("required", {}), **found.get("optional", {})}
        defaults = {name: spec[1]["default"] for name, spec in specs.items() if "default" in (spec[1:] or ({},))[0]}
        return {"class_type": kind, "inputs": defaults | inputs}
