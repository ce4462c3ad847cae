"""Settings for all tests, and the fixtures that start ComfyUI: `pack` in this process, `server` in another.

All tests use few threads and the same random examples in every run. ComfyUI is the folder in COMFYUI_PATH, else
.runtime/ComfyUI; without one the tests that need it are skipped. `python3 run.py test` sets it up first.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import settings

from launcher.environment import ROOT
from launcher.host import OWN, given_folder, is_comfyui, link_pack
from launcher.inprocess import load_pack, open_host
from launcher.server import COMPARABLE_MEMORY
from tests.support.host_server import HostServer, running

NEEDS_HOST = {"pack", "host", "server", "probed"}

IN_PARALLEL = "PYTEST_XDIST_WORKER" in os.environ
torch.set_num_threads(1 if IN_PARALLEL else min(2, os.cpu_count() or 1))

# Deadlines measure the machine, not the code; derandomize makes failures reproducible.
settings.register_profile("aclora", deadline=None, derandomize=True, max_examples=50, database=None)
settings.load_profile("aclora")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="have the ComfyUI servers of the tests compute on the GPU")
    parser.addoption("--oldest", action="store_true", help="run tests/other_hosts in the oldest ComfyUI")
    parser.addoption(
        "--newest", action="store_true", help="run tests/other_hosts with the newest PyTorch and front end"
    )


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread, which is faster for small matrices."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, so that of two processes none ends late; ComfyUI's warnings are no failures."""
    items.sort(key=lambda item: "server" not in item.path.parts)
    for item in items:
        if NEEDS_HOST & set(getattr(item, "fixturenames", ())):
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
    """The pack as ComfyUI loads it, in this process and on the CPU; its modules are pack.nodes.tiny_base etc.

    ComfyUI's folders are temporary. Its modules (folder_paths, comfy, ...) can be imported after this fixture.
    """
    open_host(host, cpu=True, base_directory=tmp_path_factory.mktemp("comfyui"))
    pack = load_pack()
    gc.freeze()  # each training collects garbage, and would look for it among the modules
    return pack


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
    """A separate server for the tests of failures, which reports at /held what it holds in memory."""
    base = tmp_path_factory.mktemp("probed")
    link_pack(base / "custom_nodes")
    shutil.copy(ROOT / "bench" / "trouble" / "probe.py", base / "custom_nodes" / "probe.py")
    with running(host, base, "probed", gpu, environment=COMPARABLE_MEMORY) as server:
        yield server


@pytest.fixture
def loras(pack: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty models/loras for one test."""
    import folder_paths

    folder = tmp_path / "loras"
    folder.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(folder)], {".safetensors"}))
    folder_paths.filename_list_cache.pop("loras", None)
    yield folder
    folder_paths.filename_list_cache.pop("loras", None)
