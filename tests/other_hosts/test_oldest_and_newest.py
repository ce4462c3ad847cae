"""The quickstart in the oldest ComfyUI, and with the newest PyTorch and front end; for these tests ask by name.

python3 run.py test tests/other_hosts --oldest              # downloads 12 MB
python3 run.py test tests/other_hosts --newest              # downloads some 4 GB into .runtime/newest
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher import other_hosts
from launcher.environment import ROOT
from launcher.host import link_pack
from launcher.server import Server
from tests.support.host_server import HostServer
from tools.workflow_files import FILES, nodes_of, read_workflow

pytestmark = pytest.mark.slow
PROMPT: dict[str, Any] = json.loads((ROOT / "tests" / "prompts" / "quickstart.json").read_text(encoding="utf-8"))
PATIENCE = 1200  # seconds for the quickstart


@pytest.fixture(scope="module", params=["oldest", "newest"])
def other(request: pytest.FixtureRequest, host: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostServer]:
    """A server of the oldest ComfyUI, or of this one in the newest environment."""
    if not request.config.getoption(f"--{request.param}"):
        pytest.skip(f"asked for with --{request.param}")
    folder, python = host, Path(sys.executable)
    if request.param == "oldest":
        folder = other_hosts.oldest_comfyui(python)
    else:
        python = other_hosts.newest_python(host)
    base = tmp_path_factory.mktemp(request.param)
    for part in ("input", "output", "user", "models/loras"):
        (base / part).mkdir(parents=True)
    pack, log = link_pack(base / "custom_nodes"), base / "server.log"
    options = ["--cpu", "--base-directory", str(base), "--database-url", "sqlite:///:memory:", "--disable-api-nodes"]
    with Server(folder, python, options, log) as server:
        yield HostServer(server, base, pack, log, set())


def test_it_is_the_version_that_is_meant(other: HostServer, request: pytest.FixtureRequest) -> None:
    found = other.get_json("/system_stats")["system"]
    if "oldest" in request.node.name:
        assert found["comfyui_version"] == other_hosts.OLDEST
    else:
        assert numbers(found["pytorch_version"]) >= (2, 9)


def numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def test_all_nodes_and_templates_are_there(other: HostServer) -> None:
    assert len([name for name in other.get_json("/object_info") if name.startswith("ACLoRA")]) == 16
    assert set(other.get_json("/workflow_templates")[other.pack_folder]) == set(FILES.values())


def test_every_core_node_of_the_workflows_is_there(other: HostServer) -> None:
    known = set(other.get_json("/object_info")) | {"MarkdownNote"}
    for name in FILES:
        assert {node["type"] for node in nodes_of(read_workflow(name))} <= known, name


def test_no_name_of_the_host_is_missing(other: HostServer) -> None:
    assert "AC-LoRA: this ComfyUI" not in other.log.read_text(encoding="utf-8")


def test_the_workflows_open_in_its_front_end(other: HostServer) -> None:
    pytest.importorskip("playwright", reason="playwright is not installed: pip install -r tests/requirements.txt")
    from tests.support.browser import MISSING, find_browser, load_workflow, open_front_end, unknown_nodes

    if find_browser() is None:
        pytest.skip(f"the front end is not tested, as {MISSING}")
    with open_front_end(other.server.address) as page:
        for name in FILES:
            load_workflow(page, read_workflow(name))
            assert unknown_nodes(page) == [], name


def test_the_quickstart_trains_and_draws(other: HostServer) -> None:
    history = other.run(PROMPT, timeout=PATIENCE)
    assert len(other.images(history)) == 2
    assert len(list((other.base / "models" / "loras").rglob("*.safetensors"))) == 1
