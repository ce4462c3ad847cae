"""Write the list of what the pack uses of ComfyUI, from the pack's source: nodes/compatibility/host_names.json.

    python -m tools.host_names            # writes the list; tests/host/test_host_names.py says when it is needed

Found are names that are imported from ComfyUI's modules, attributes of its modules, also those that are read with
getattr or exchanged with replaced_attribute, and attributes of its objects, which are recognised by the names that they
have here (RECEIVERS) or by their annotation.
"""

from __future__ import annotations

import ast
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "nodes" / "compatibility" / "host_names.json"
HOST_MODULES = (
    "comfyui_version",
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "folder_paths",
    "server",
    "nodes",
)
NAMESPACES = ("io", "ui")  # of comfy_api.latest; what is used are the names in them
BY_NAME = ("getattr", "hasattr", "replaced_attribute")  # functions that take an object and the name of an attribute
MODEL, PATCHER = "comfy.model_base.BaseModel", "comfy.model_patcher.ModelPatcher"
# The last part of an expression, and the class of what it holds.
RECEIVERS = {
    "base": MODEL,
    "patcher": PATCHER,
    "clip": "comfy.sd.CLIP",
    "_clip": "comfy.sd.CLIP",
    "vae": "comfy.sd.VAE",
    "instance": "server.PromptServer",
}
PARAMETERS = {"model": PATCHER}  # of functions, where nothing else is said of their type

Names = dict[str, dict[str, list[str]]]  # names and the files that use them, by module or class


def host_names(root: Path = ROOT) -> Names:
    """Return the names that the pack's nodes use of ComfyUI."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for path in sorted((root / "nodes").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for owner, name in {*names_of_modules(tree), *names_of_objects(tree)}:
            found[owner][name].add(path.relative_to(root).as_posix())
    return {owner: {name: sorted(found[owner][name]) for name in sorted(found[owner])} for owner in sorted(found)}


def names_of_modules(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield modules of ComfyUI and the names in them that a file uses."""
    modules: dict[str, str] = {}  # what the file calls a module, and its name
    for node in runtime_nodes(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name: alias.name for alias in node.names if is_hosts(alias.name)}
        elif isinstance(node, ast.ImportFrom) and not node.level and is_hosts(node.module or ""):
            for alias in node.names:
                yield str(node.module), alias.name
                if alias.name in NAMESPACES or alias.asname:
                    modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in runtime_nodes(tree):
        owner, name = attribute_of(node)
        if owner is not None and ast.unparse(owner) in modules:
            yield modules[ast.unparse(owner)], name


def names_of_objects(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield classes of ComfyUI and the attributes of their objects that a file uses."""
    for node in runtime_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield from names_of_parameters(node)
        owner, name = attribute_of(node)
        kind = RECEIVERS.get(last_part(owner))
        if kind and not name.startswith("__"):
            yield kind, name


def names_of_parameters(function: ast.FunctionDef) -> Iterator[tuple[str, str]]:
    """Yield classes of ComfyUI and their attributes that a function uses of its parameters."""
    own = {
        each.arg: PARAMETERS[each.arg]
        for each in function.args.args
        if each.arg in PARAMETERS and ast.unparse(each.annotation or ast.Constant("Any")) in ("Any", "ModelPatcher")
    }
    for node in ast.walk(function):
        owner, name = attribute_of(node)
        if isinstance(owner, ast.Name) and owner.id in own:
            yield own[owner.id], name


def attribute_of(node: ast.AST) -> tuple[ast.AST | None, str]:
    """Return the object and the name of the attribute that an expression reads; None if it is no such expression."""
    if isinstance(node, ast.Attribute):
        return node.value, node.attr
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BY_NAME:
        owner, name = node.args[:2]
        if isinstance(name, ast.Constant):
            return owner, str(name.value)
    return None, ""


def last_part(node: ast.AST | None) -> str:
    """Return the last name of an expression such as self.patcher; empty for other expressions."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the parts of a syntax tree, without those for the type checker alone."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")):
            yield node
            yield from runtime_nodes(node)


def is_hosts(module: str) -> bool:
    """Return whether a module is ComfyUI's."""
    return module.split(".")[0] in HOST_MODULES


def main() -> None:
    LIST.write_text(json.dumps(host_names(), indent=1) + "\n", encoding="utf-8")
    print(f"{LIST.relative_to(ROOT)}: {sum(map(len, host_names().values()))} names")


if __name__ == "__main__":
    main()
