"""A running ComfyUI with the pack in it, for tests that need a server."""

from __future__ import annotations

import contextlib
import re
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from launcher.host import link_pack
from launcher.server import Server


@dataclass(frozen=True)
class HostServer:
    """A running ComfyUI with the pack in it, and the folders that it writes to."""

    server: Server
    base: Path  # parent of models, input, output, user and custom_nodes
    pack_folder: str  # name in custom_nodes
    log: Path  # its output
    start_warnings: set[str]  # warnings and errors logged at the start
    pace: int = 1  # factor for the number of steps, to take as long as on a CPU

    def get(self, path: str) -> bytes:
        """Return the body of a page."""
        return self.server.get(path)

    def get_json(self, path: str) -> Any:
        """Return a JSON page."""
        return self.server.get_json(path)

    def post_json(self, path: str, data: object) -> Any:
        """Send JSON and return the JSON answer."""
        return self.server.post_json(path, data)

    def node(self, kind: str, **inputs: Any) -> dict[str, Any]:
        """Return a node of a prompt, with defaults for missing inputs."""
        return self.server.node(kind, **inputs)

    def submit(self, prompt: dict[str, Any]) -> str:
        """Queue a prompt and return its id. Raises AssertionError with the server's message if it is refused."""
        try:
            return str(self.post_json("/prompt", {"prompt": prompt, "client_id": uuid.uuid4().hex})["prompt_id"])
        except HTTPError as error:
            raise AssertionError(f"the server refused the prompt: {error.read().decode()}") from error

    def wait(self, prompt_id: str, timeout: float = 120) -> dict[str, Any]:
        """Wait for the end of a prompt and return its history, also after an error; cancel it after the timeout."""
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            history = self.get_json(f"/history/{prompt_id}")
            if prompt_id in history:
                return dict(history[prompt_id])
            time.sleep(0.2)
        self.post_json("/interrupt", {"prompt_id": prompt_id})
        raise AssertionError(f"the prompt did not end within {timeout:.0f} seconds; the server's log: {self.log}")

    def run(self, prompt: dict[str, Any], timeout: float = 120) -> dict[str, Any]:
        """Run a prompt to its end and return its history. Raises AssertionError if a node fails."""
        history = self.wait(self.submit(prompt), timeout)
        assert history["status"]["status_str"] == "success", history["status"]["messages"][-1]
        return history

    def images(self, history: dict[str, Any]) -> list[Path]:
        """Return the image files that a prompt's output nodes saved."""
        images = [image for node in history["outputs"].values() for image in node.get("images", ())]
        saved = [image for image in images if image["type"] == "output"]
        return [self.base / "output" / image["subfolder"] / image["filename"] for image in saved]


def messages(log: Path) -> set[str]:
    """Return the lines of a log without times."""
    return {re.sub(r"^\[\d[^]]*\] ", "", line) for line in log.read_text(encoding="utf-8").splitlines()}


def server_options(base: Path, warnings: Path, gpu: bool = False) -> list[str]:
    """Return options for a server that uses nothing outside its base folder, nor the network."""
    return [
        *([] if gpu else ["--cpu"]),
        "--base-directory",
        str(base),
        "--database-url",
        "sqlite:///:memory:",
        "--disable-api-nodes",
        "--verbose",
        "WARNING",
        str(warnings),
        "--verbose",
        "INFO",
    ]


@contextlib.contextmanager
def running(host: Path, base: Path, name: str, gpu: bool = False, **how: Any) -> Iterator[HostServer]:
    """Run the real server on a free port with the pack in it; a base folder can be used several times."""
    for part in ("input", "output", "user", "models/loras"):
        (base / part).mkdir(parents=True, exist_ok=True)
    folder = next((path.name for path in (base / "custom_nodes").glob("*")), None) or link_pack(base / "custom_nodes")
    log, warnings = base / f"{name}.log", base / f"{name}_warnings.log"
    with Server(host, Path(sys.executable), server_options(base, warnings, gpu), log, **how) as server:
        yield HostServer(server, base, folder, log, messages(warnings), 100 if gpu else 1)
