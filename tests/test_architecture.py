"""Three layers, one direction: the root imports nodes, nodes import aclora_core, and aclora_core imports neither."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = {"torch", "safetensors", "numpy", "PIL", "einops", "matplotlib"}
TORCH_BRINGS = {"triton"}  # with its builds for CUDA on Linux; the kernels do without it elsewhere
# What a node needs to be a node. Everything else of ComfyUI is for nodes/host.
HOST_FACE = {"comfy_api", "folder_paths"}
HOST_FOLDER = ROOT / "nodes" / "host"

CORE = sorted((ROOT / "aclora_core").rglob("*.py"))
NODES = sorted((ROOT / "nodes").rglob("*.py"))
FACE = [path for path in NODES if not path.is_relative_to(HOST_FOLDER)]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST) -> Iterator[tuple[int, str, list[str]]]:
    """(dots, module, names) of every import, in functions too; those for the type checker alone do not count."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", [alias.name for alias in node.names]
        else:
            yield from imports(node)


def read(path: Path) -> list[tuple[int, str, list[str]]]:
    return list(imports(ast.parse(path.read_text(encoding="utf-8"))))


def foreign(path: Path) -> set[str]:
    """The top-level modules that a file imports from outside the pack, except the standard library."""
    return {module.split(".")[0] for dots, module, _ in read(path) if not dots} - set(sys.stdlib_module_names)


def reaches(path: Path) -> set[Path]:
    """The files and folders of the pack that a file's relative imports name."""
    found = set()
    for dots, module, names in read(path):
        if not dots:
            continue
        start = path.parents[dots - 1].joinpath(*module.split(".")) if module else path.parents[dots - 1]
        for target in [start / each for each in names] if start.is_dir() else [start]:
            found.add(next((p for p in (target, target.with_suffix(".py")) if p.exists()), start))
    return found


@pytest.mark.parametrize("path", CORE, ids=name)
def test_core_imports_only_the_agreed_libraries(path: Path) -> None:
    assert foreign(path) <= LIBRARIES | (TORCH_BRINGS if path.parent.name == "kernels" else set())


@pytest.mark.parametrize("path", CORE, ids=name)
def test_core_reaches_nothing_outside_itself(path: Path) -> None:
    outside = {target for target in reaches(path) if not target.is_relative_to(ROOT / "aclora_core")}
    assert not outside


@pytest.mark.parametrize("path", FACE, ids=name)
def test_nodes_know_only_the_face_of_comfyui(path: Path) -> None:
    breaches = foreign(path) - LIBRARIES - HOST_FACE
    assert not breaches, f"move what needs {', '.join(sorted(breaches))} to nodes/host"


@pytest.mark.parametrize("path", NODES, ids=name)
def test_nodes_reach_only_nodes_and_the_core(path: Path) -> None:
    allowed = (ROOT / "nodes", ROOT / "aclora_core")
    outside = {target for target in reaches(path) if not any(target.is_relative_to(folder) for folder in allowed)}
    assert not outside


def test_root_imports_nothing_until_comfyui_asks() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    assert not [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [module for _, module, _ in imports(tree)] == ["nodes"]


@pytest.mark.parametrize("path", [ROOT / "__init__.py", *NODES, *CORE], ids=name)
def test_the_pack_never_edits_the_path_of_imports(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert "sys.path" not in attributes


@pytest.mark.parametrize("files", [CORE, NODES], ids=["aclora_core", "nodes"])
def test_modules_form_no_cycle(files: list[Path]) -> None:
    graph = {path: reaches(path) & set(files) for path in files}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("imports go in a circle: " + " -> ".join(name(path) for path in error.args[1]))
