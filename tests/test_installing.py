"""What the registry, ComfyUI-Manager and programs that list the nodes of packs read of this one."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from launcher.environment import ROOT
from tools.workflow_files import FILES, FIRST_NODE, IDS_EACH, WORKFLOWS, nodes_of, read_workflow, workflow_file
from tools.workflow_origins import with_origins

PYTHON = [path for path in ROOT.rglob("*.py") if ".runtime" not in path.relative_to(ROOT).parts]
PAGES = sorted(path.stem for path in (ROOT / "nodes" / "web" / "docs").glob("*.md"))
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def node_classes() -> list[str]:
    """Classes whose direct base is ComfyUI's node class, in any Python file, as ComfyUI-Manager finds them."""
    found = []
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            bases = [ast.unparse(base) for base in node.bases] if isinstance(node, ast.ClassDef) else []
            found += [node.name for base in bases if base.split(".")[-1] == "ComfyNode"]
    return sorted(found)


def test_programs_find_every_node_and_no_other() -> None:
    assert node_classes() == PAGES


def test_every_node_id_is_a_literal() -> None:
    sources = [path.read_text(encoding="utf-8") for path in PYTHON if path.is_relative_to(ROOT / "nodes")]
    found = [name for source in sources for name in re.findall(r'\bnode_id="(\w+)"', source)]
    assert sorted(found) == PAGES


def test_no_file_looks_like_nodes_of_the_older_kind() -> None:
    """ComfyUI-Manager reads the keys of such tables in every file, also in tests and benchmarks."""
    tables = re.compile(r"_CLASS_MAPPINGS\s*=\s*{([^}]*)}|_CLASS_MAPPINGS\[[\"'](.*?)[\"']\]")
    found = [key for path in PYTHON for table, key in tables.findall(path.read_text(encoding="utf-8")) if key or table]
    assert not [key for key in found if re.search(r"[\"']\s*:", key)]


@pytest.mark.parametrize("name", FILES)
def test_every_node_of_a_workflow_names_its_pack(name: str) -> None:
    workflow = read_workflow(name)
    assert workflow == with_origins(workflow), "run python -m tools.workflow_origins"
    packs = {node["type"]: node["properties"].get("cnr_id") for node in nodes_of(workflow)}
    own = {pack for kind, pack in packs.items() if kind in PAGES}
    assert own == (set() if "caption" in name else {"aclora"})  # that one has ComfyUI's nodes alone
    assert {pack for kind, pack in packs.items() if kind not in (*PAGES, "MarkdownNote")} == {"comfy-core"}


def test_every_workflow_has_its_own_node_ids() -> None:
    """The front end sends what a node shows to the node of that id in whatever workflow is open."""
    for name in FILES:
        workflow = read_workflow(name)
        graphs = [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]
        ids = [node["id"] for graph in graphs for node in graph["nodes"]]
        assert len(ids) == len(set(ids)) and set(ids) <= set(range(FIRST_NODE[name], FIRST_NODE[name] + IDS_EACH)), name


def test_the_files_are_those_that_have_a_short_name_and_the_quickstart_comes_first() -> None:
    assert {path.stem for path in WORKFLOWS.glob("*.json")} == set(FILES.values())
    assert min(FILES.values()) == FILES["quickstart"]


@pytest.mark.parametrize("name", FILES)
def test_every_thumbnail_is_square_and_small(name: str) -> None:
    path = workflow_file(name, ".jpg")
    with Image.open(path) as image:
        assert image.width == image.height and image.width >= 400
    assert path.stat().st_size < 150_000


@pytest.mark.parametrize(
    ("key", "name", "shape"), [("Icon", "icon.png", (400, 400)), ("Banner", "banner.png", (1260, 540))]
)
def test_icon_and_banner_lie_where_their_address_says(key: str, name: str, shape: tuple[int, int]) -> None:
    (address,) = re.findall(rf'^{key} = "https://raw.githubusercontent.com/[^/]+/[^/]+/main/([^"]+)"', PROJECT, re.M)
    with Image.open(ROOT / address) as image:
        assert (Path(address).name, image.size) == (name, shape)


def test_one_name_marks_what_the_owner_fills_in() -> None:
    """.github/workflows/publish.yml refuses to publish while it is there, and the README says what to do."""
    owners = re.findall(r'^(\w+) = "[^"]*OWNER', PROJECT, re.M)
    assert owners in ([], ["Repository", "Documentation", "Issues", "PublisherId", "Icon", "Banner"])
    assert "grep -n OWNER pyproject.toml" in (ROOT / ".github" / "workflows" / "publish.yml").read_text(
        encoding="utf-8"
    )


def test_every_line_of_the_ignore_file_leaves_something_out() -> None:
    pathspec = pytest.importorskip("pathspec")
    lines = [
        line for line in (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines() if line[:1] not in ("#", "")
    ]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no checkout of git")
    for line in lines:
        spec = pathspec.PathSpec.from_lines("gitignore", [line])
        assert any(map(spec.match_file, listed.stdout.splitlines())), line
