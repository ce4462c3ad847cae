"""The layers and rooms of the pack, read from its imports.

ComfyUI loads the root, the root imports nodes, and nodes import aclora_core, which imports neither. A room is a package
in aclora_core, or nodes/host; the rest of the pack imports only from its face, its `__init__`. In which order the rooms
import each other is a contract of import-linter (pyproject.toml); what it cannot express is tested here.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = {"torch", "safetensors", "numpy", "PIL", "matplotlib"}
TORCH_BRINGS = {"triton"}  # with its builds for CUDA on Linux; the kernels do without it elsewhere
# What a node needs to be a node. Everything else of ComfyUI is for nodes/host.
HOST_FACE = {"comfy_api", "folder_paths"}
HOST_FOLDER = ROOT / "nodes" / "host"
# What decides whether nodes are loaded looks at ComfyUI's version and its list of templates.
WITHOUT_NODES = {ROOT / "nodes" / "compatibility": {"comfyui_version", "aiohttp"}}

CORE_FOLDER = ROOT / "aclora_core"
CORE = sorted(CORE_FOLDER.rglob("*.py"))
NODES = sorted((ROOT / "nodes").rglob("*.py"))
FACE = [path for path in NODES if not path.is_relative_to(HOST_FOLDER)]


class Import(NamedTuple):
    """One import statement."""

    dots: int  # 0 for an absolute import
    module: str
    names: list[str]  # empty for `import module`


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST, type_checking: bool = True) -> Iterator[Import]:
    """Every import, in functions too, with or without those for the type checker alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING") and not type_checking:
            continue
        if isinstance(node, ast.Import):
            yield from (Import(0, alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield Import(node.level, node.module or "", [alias.name for alias in node.names])
        else:
            yield from imports(node, type_checking)


def read(path: Path, type_checking: bool = True) -> list[Import]:
    return list(imports(ast.parse(path.read_text(encoding="utf-8")), type_checking))


def foreign(path: Path) -> set[str]:
    """The top-level modules that a file imports from outside the pack when it runs, without the standard library."""
    found = {each.module.split(".")[0] for each in read(path, type_checking=False) if not each.dots}
    return found - set(sys.stdlib_module_names)


def reaches(path: Path) -> set[Path]:
    """The files of the pack that a file's relative imports load, the faces of packages (`__init__.py`) among them."""
    return {target for each in read(path) if each.dots for target in targets(path, each)}


def targets(path: Path, each: Import) -> set[Path]:
    """The files that one relative import in a file at `path` names."""
    start = path.parents[each.dots - 1].joinpath(*filter(None, each.module.split(".")))
    if not start.is_dir():
        return {start.with_suffix(".py")}
    return {file_of(start, imported) for imported in each.names}


def file_of(package: Path, imported: str) -> Path:
    """The file of a name that is imported from a package: the package's face, a module or a package in it."""
    face = package / "__init__.py"
    if imported in exported(face):  # comes first, as a function may have the name of its module: training.train
        return face
    candidates = (package / f"{imported}.py", package / imported / "__init__.py")
    return next((file for file in candidates if file.exists()), face)


@functools.cache
def exported(face: Path) -> frozenset[str]:
    """The names that a face takes over from the package's modules."""
    found = read(face) if face.exists() else []
    return frozenset(name for each in found if each.dots and each.module for name in each.names)


def room_of(path: Path) -> Path | None:
    """The room that a file lies in; None outside all rooms."""
    if path.is_relative_to(HOST_FOLDER):
        return HOST_FOLDER
    if not path.is_relative_to(CORE_FOLDER):
        return None
    parts = path.relative_to(CORE_FOLDER).parts
    return CORE_FOLDER / parts[0] if len(parts) > 1 else None


def past_the_face(path: Path) -> list[str]:
    """The files inside another room that a file imports from, past that room's face."""
    reached = sorted(target for target in reaches(path) if room_of(target) not in (None, room_of(path)))
    return [name(target) for target in reached if target != room_of(target) / "__init__.py"]


@pytest.mark.parametrize("path", CORE, ids=name)
def test_core_imports_only_the_agreed_libraries(path: Path) -> None:
    assert foreign(path) <= LIBRARIES | (TORCH_BRINGS if path.parent.name == "kernels" else set())


@pytest.mark.parametrize("path", CORE, ids=name)
def test_core_reaches_nothing_outside_itself(path: Path) -> None:
    outside = {target for target in reaches(path) if not target.is_relative_to(CORE_FOLDER)}
    assert not outside


@pytest.mark.parametrize("path", FACE, ids=name)
def test_nodes_know_only_the_face_of_comfyui(path: Path) -> None:
    breaches = foreign(path) - LIBRARIES - HOST_FACE - WITHOUT_NODES.get(path.parent, set())
    assert not breaches, f"move what needs {', '.join(sorted(breaches))} to nodes/host"


@pytest.mark.parametrize("path", NODES, ids=name)
def test_nodes_reach_only_nodes_and_the_core(path: Path) -> None:
    allowed = (ROOT / "nodes", CORE_FOLDER)
    outside = {target for target in reaches(path) if not any(target.is_relative_to(folder) for folder in allowed)}
    assert not outside


@pytest.mark.parametrize("path", [*CORE, *NODES], ids=name)
def test_rooms_are_entered_through_their_face(path: Path) -> None:
    breaches = past_the_face(path)
    assert not breaches, f"import from the room, not from {', '.join(breaches)}"


@pytest.mark.parametrize("path", CORE, ids=name)
def test_files_of_a_room_do_not_import_its_face(path: Path) -> None:
    """The face imports the files, so this would be a circle."""
    face = path.parent / "__init__.py"
    imports_it = path != face and face in reaches(path)
    assert not imports_it, f"import from the file in {name(path.parent)} that has the name, or move it to one"


@pytest.mark.parametrize("path", [*CORE, *NODES], ids=name)
def test_every_relative_import_names_a_file(path: Path) -> None:
    """Else the tests above would miss what it loads."""
    missing = sorted(name(target) for target in reaches(path) if not target.is_file())
    assert not missing


def test_root_imports_nothing_until_comfyui_asks() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    assert not [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [each.module for each in imports(tree)] == ["nodes.compatibility"]


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


def test_a_circle_through_a_face_is_seen(tmp_path: Path) -> None:
    """`from . import NAME` in a file loads the face, which may import that file."""
    (tmp_path / "__init__.py").write_text("from .part import thing\nNAME = 1\n", encoding="utf-8")
    part = tmp_path / "part.py"
    part.write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import NAME\n", encoding="utf-8")
    assert reaches(part) == {tmp_path / "__init__.py"} and reaches(tmp_path / "__init__.py") == {part}


def test_a_name_of_a_face_comes_before_a_module_of_that_name(tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "__init__.py").write_text("from .train import train\n", encoding="utf-8")
    (tmp_path / "room" / "train.py").write_text("def train(): ...\n", encoding="utf-8")
    caller = tmp_path / "caller.py"
    caller.write_text("from .room import train\n", encoding="utf-8")
    assert reaches(caller) == {tmp_path / "room" / "__init__.py"}


def test_no_folder_hides_the_workflows() -> None:
    """ComfyUI serves templates from the first of these folders that a pack has; ours lie in workflows."""
    names = ("example_workflows", "example", "examples", "workflow")
    assert not [name for name in names if (ROOT / name).exists()]
