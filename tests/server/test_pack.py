"""The pack in the real ComfyUI: it loads without warnings, and every node is documented."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote

import pytest

from launcher.environment import ROOT
from launcher.server import Server
from tests.support.host_server import HostServer, messages, server_options
from tools.workflow_files import FILES

DOCS = ROOT / "nodes" / "web" / "docs"
STEPS = ("TinyBase", "Dataset", "Train", "Save", "Load", "Inspect", "Resize", "Evaluate")
OPTIONS = ("Learning", "Layer", "Rank", "Validation", "TextEncoder", "Preview", "Checkpoint", "Speed")
NODES = {f"ACLoRA{name}" for name in (*STEPS, *(f"{kind}Options" for kind in OPTIONS))}


@pytest.fixture(scope="module")
def object_info(server: HostServer) -> dict[str, Any]:
    """The server's descriptions of the pack's nodes, by node id."""
    nodes = server.get_json("/object_info").items()
    module = f"custom_nodes.{server.pack_folder}"
    return {node_id: node for node_id, node in nodes if node["python_module"] == module}


@pytest.fixture(scope="module")
def node_classes(pack: ModuleType) -> list[Any]:
    """The pack's node classes, as ComfyUI gets them."""

    async def ask() -> list[Any]:
        return await (await pack.comfy_entrypoint()).get_node_list()

    return asyncio.run(ask())


def test_loading_adds_no_warning_or_error(server: HostServer, host: Path, tmp_path: Path) -> None:
    for name in ("custom_nodes", "input", "user"):
        (tmp_path / name).mkdir()
    alone, log = tmp_path / "alone.log", tmp_path / "server.log"
    with Server(host, Path(sys.executable), server_options(tmp_path, alone), log):
        pass
    assert server.start_warnings - messages(alone) == set()
    assert "IMPORT FAILED" not in server.log.read_text(encoding="utf-8")


def test_all_nodes_are_registered(object_info: dict[str, Any]) -> None:
    assert NODES <= set(object_info)


def test_every_node_has_a_description(object_info: dict[str, Any]) -> None:
    for node_id, node in object_info.items():
        assert node_id.startswith("ACLoRA")
        assert node["category"] == ("AC-LoRA/options" if node_id.endswith("Options") else "AC-LoRA"), node_id
        assert "AC-LoRA" in node["display_name"], node_id
        assert node["description"].strip(), node_id
        assert node["search_aliases"], node_id


def test_every_input_and_output_has_a_tooltip(object_info: dict[str, Any]) -> None:
    silent = []
    for node_id, node in object_info.items():
        for kind in ("required", "optional"):
            for name, spec in node["input"].get(kind, {}).items():
                if not (len(spec) > 1 and spec[1].get("tooltip")):
                    silent.append(f"{node_id}.{name}")
        tooltips = node.get("output_tooltips") or [None] * len(node["output"])
        silent += [f"{node_id} -> {name}" for name, tip in zip(node["output_name"], tooltips, strict=True) if not tip]
    assert not silent


def test_node_id_is_the_class_name(node_classes: list[Any]) -> None:
    assert node_classes
    for node in node_classes:
        assert node.define_schema().node_id == node.__name__


def test_the_help_page_of_every_node_is_served(object_info: dict[str, Any], server: HostServer) -> None:
    assert object_info
    for node_id in object_info:
        page = DOCS / f"{node_id}.md"
        assert page.is_file(), f"{page} is missing"
        assert server.get(f"/extensions/{server.pack_folder}/docs/{node_id}.md") == page.read_bytes()


def test_help_pages_name_every_input(object_info: dict[str, Any]) -> None:
    for node_id, node in object_info.items():
        page = (DOCS / f"{node_id}.md").read_text(encoding="utf-8")
        rows = "\n".join(line.split("|")[1] for line in page.splitlines() if line.startswith("|"))
        marked = re.findall(r"[*`](\w+)[*`]", page) + re.findall(r"\w+", rows)
        specs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
        inputs = {(spec[1].get("display_name") or name) if len(spec) > 1 else name for name, spec in specs.items()}
        assert not sorted(inputs - {*marked, "options"}), f"{node_id}.md does not name these inputs"


def test_pictures_of_help_pages_are_served_and_each_main_node_has_one(
    object_info: dict[str, Any], server: HostServer
) -> None:
    for node_id in object_info:
        page = (DOCS / f"{node_id}.md").read_text(encoding="utf-8")
        pictures = re.findall(r"!\[[^]]+\]\((images/[^)]+)\)", page)
        assert pictures or (node_id.endswith("Options") and node_id != "ACLoRAPreviewOptions"), node_id
        for picture in pictures:
            served = server.get(f"/extensions/{server.pack_folder}/docs/{picture}")
            assert served == (DOCS / picture).read_bytes() and len(served) < 100_000, picture


def test_every_help_page_belongs_to_a_node(object_info: dict[str, Any]) -> None:
    assert {page.stem for page in DOCS.glob("*.md")} <= set(object_info)


def test_workflows_are_served_as_templates_in_the_order_of_their_names(server: HostServer) -> None:
    assert server.get_json("/workflow_templates")[server.pack_folder] == sorted(FILES.values())


@pytest.mark.parametrize("file", FILES.values(), ids=FILES.keys())
def test_every_workflow_has_a_thumbnail(file: str, server: HostServer) -> None:
    address = f"/api/workflow_templates/{server.pack_folder}/{quote(file)}"
    assert server.get_json(f"{address}.json")["nodes"]
    assert server.get(f"{address}.jpg").startswith(b"\xff\xd8"), "the template browser asks for a .jpg"
