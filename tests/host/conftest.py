"""Fixtures for tests that run in the real ComfyUI: `pack` in this process, `server` in another.

The host is the folder in COMFYUI_PATH, else .runtime/ComfyUI; without one these tests are skipped and say so.
`python3 run.py test` makes one first.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import HTTPError

import pytest

from tools.runtime.environment import ROOT
from tools.runtime.host import OWN, given_folder, is_comfyui, link_pack
from tools.runtime.inprocess import load_pack, open_host
from tools.runtime.server import COMPARABLE_MEMORY, Server

HOST_TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A warning of the host's is no failure of ours."""
    for item in items:
        if HOST_TESTS in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session")
def host() -> Path:
    """The folder of ComfyUI."""
    folder = given_folder(ROOT) or OWN
    if not is_comfyui(folder):
        pytest.skip("no ComfyUI: set COMFYUI_PATH, or run `python3 run.py test`, which makes one")
    if importlib.util.find_spec("aiohttp") is None:
        pytest.skip("this Python has not ComfyUI's packages: run `python3 run.py test`, which installs them")
    return folder


@pytest.fixture(scope="session")
def pack(host: Path, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The pack, loaded as ComfyUI loads it, in this process and on the CPU; its modules are pack.nodes.train and so on.

    ComfyUI's folders are temporary ones. Its modules (folder_paths, comfy, ...) can be imported after this fixture.
    """
    open_host(host, cpu=True, base_directory=tmp_path_factory.mktemp("comfyui"))
    return load_pack()


@dataclass(frozen=True)
class HostServer:
    """A running ComfyUI with the pack in it, and the folders that it writes to."""

    server: Server
    base: Path  # its models, input, output, user and custom_nodes
    pack_folder: str  # the pack's name in custom_nodes
    log: Path  # everything it says
    start_warnings: set[str]  # the warnings and errors that it began with
    pace: int = 1  # how many times as many steps take as long as on a CPU

    def get(self, path: str) -> bytes:
        """The body of a page."""
        return self.server.get(path)

    def get_json(self, path: str) -> Any:
        """A page that is JSON."""
        return self.server.get_json(path)

    def post_json(self, path: str, data: object) -> Any:
        """Send JSON and read JSON."""
        return self.server.post_json(path, data)

    def node(self, kind: str, **inputs: Any) -> dict[str, Any]:
        """A node of a prompt; what is not given is as it comes."""
        return self.server.node(kind, **inputs)

    def submit(self, prompt: dict[str, Any]) -> str:
        """Queue a prompt and give its id; AssertionError with the server's words when it refuses."""
        try:
            return str(self.post_json("/prompt", {"prompt": prompt, "client_id": uuid.uuid4().hex})["prompt_id"])
        except HTTPError as error:
            raise AssertionError(f"the server refused the prompt: {error.read().decode()}") from error

    def wait(self, prompt_id: str, timeout: float = 120) -> dict[str, Any]:
        """The history of a prompt once it has ended, well or not; it is cancelled when that takes too long."""
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            history = self.get_json(f"/history/{prompt_id}")
            if prompt_id in history:
                return dict(history[prompt_id])
            time.sleep(0.2)
        self.post_json("/interrupt", {"prompt_id": prompt_id})
        raise AssertionError(f"the prompt did not end within {timeout:.0f} seconds; the server's log: {self.log}")

    def run(self, prompt: dict[str, Any], timeout: float = 120) -> dict[str, Any]:
        """Run a prompt to its end and give its history; AssertionError when a node fails."""
        history = self.wait(self.submit(prompt), timeout)
        assert history["status"]["status_str"] == "success", history["status"]["messages"][-1]
        return history

    def pictures(self, history: dict[str, Any]) -> list[Path]:
        """The files that a prompt's output nodes saved."""
        images = [image for node in history["outputs"].values() for image in node.get("images", ())]
        saved = [image for image in images if image["type"] == "output"]
        return [self.base / "output" / image["subfolder"] / image["filename"] for image in saved]


def messages(log: Path) -> set[str]:
    """The lines of a log without their times."""
    return {re.sub(r"^\[\d[^]]*\] ", "", line) for line in log.read_text(encoding="utf-8").splitlines()}


def server_options(base: Path, warnings: Path, gpu: bool = False) -> list[str]:
    """A server that touches nothing outside its base folder, nor the network."""
    return [
        *([] if gpu else ["--cpu"]), "--base-directory", str(base), "--database-url", "sqlite:///:memory:",
        "--disable-api-nodes", "--verbose", "WARNING", str(warnings), "--verbose", "INFO",
    ]


@contextlib.contextmanager
def running(host: Path, base: Path, name: str, gpu: bool = False, **how: Any) -> Iterator[HostServer]:
    """The real server on a free port with the pack in it; several may follow each other over one base."""
    for part in ("input", "output", "user", "models/loras"):
        (base / part).mkdir(parents=True, exist_ok=True)
    folder = next((path.name for path in (base / "custom_nodes").glob("*")), None) or link_pack(base / "custom_nodes")
    log, warnings = base / f"{name}.log", base / f"{name}_warnings.log"
    with Server(host, Path(sys.executable), server_options(base, warnings, gpu), log, **how) as server:
        yield HostServer(server, base, folder, log, messages(warnings), 100 if gpu else 1)


@pytest.fixture(scope="session")
def gpu(request: pytest.FixtureRequest) -> bool:
    """Whether servers compute on the GPU; on the CPU unless pytest is given --gpu."""
    return bool(request.config.getoption("--gpu"))


@pytest.fixture(scope="session")
def server(host: Path, tmp_path_factory: pytest.TempPathFactory, gpu: bool) -> Iterator[HostServer]:
    """One server for all tests, in temporary folders."""
    with running(host, tmp_path_factory.mktemp("server"), "server", gpu) as server:
        yield server


@pytest.fixture(scope="session")
def probed(host: Path, tmp_path_factory: pytest.TempPathFactory, gpu: bool) -> Iterator[HostServer]:
    """A server of its own for the tests of trouble, which tells at /held what it holds in memory."""
    base = tmp_path_factory.mktemp("probed")
    link_pack(base / "custom_nodes")
    shutil.copy(ROOT / "bench" / "trouble_parts" / "probe.py", base / "custom_nodes" / "probe.py")
    with running(host, base, "probed", gpu, environment=COMPARABLE_MEMORY) as server:
        yield server


@pytest.fixture
def loras(pack: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty models/loras of this test's own."""
    import folder_paths

    folder = tmp_path / "loras"
    folder.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(folder)], {".safetensors"}))
    folder_paths.filename_list_cache.pop("loras", None)
    yield folder
    folder_paths.filename_list_cache.pop("loras", None)
