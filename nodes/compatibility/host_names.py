"""Look for the names of ComfyUI that the pack uses, so that one that is gone is reported by its name.

host_names.json holds them, by module or class, with the files that use them; `python -m tools.host_names` writes it.
"""

from __future__ import annotations

import importlib
import inspect
import json
import linecache
import re
import sys
from pathlib import Path
from typing import Any

LIST = Path(__file__).with_name("host_names.json")
# Defined only where there is a GPU, and used only there.
WITH_GPU = frozenset({"comfy.ops.SDPA_BACKEND_PRIORITY"})


def missing_names() -> dict[str, list[str]]:
    """Return the names that this ComfyUI has not, each with the files of the pack that use it."""
    expected: dict[str, dict[str, list[str]]] = json.loads(LIST.read_text(encoding="utf-8"))
    missing: dict[str, list[str]] = {}
    for owner, names in expected.items():
        found = _find(owner)
        missing |= {f"{owner}.{name}": files for name, files in names.items() if not _has(found, name)}
    return {name: files for name, files in missing.items() if name not in WITH_GPU}


def _find(name: str) -> Any:
    """Return a module, or what a module holds under the rest of the name; None if there is none."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            found = getattr(found, part, None)
        return found
    return None


def _has(owner: Any, name: str) -> bool:
    """Return whether a module has a name, or objects of a class an attribute."""
    if hasattr(owner, name):
        return True
    if inspect.ismodule(owner):
        return _find(f"{owner.__name__}.{name}") is not None
    kinds = owner.__mro__[:-1] if inspect.isclass(owner) else ()
    return any(re.search(rf"\b(self|{kind.__name__})\.{name}\b[^=\n]*=[^=]", _source(kind)) for kind in kinds)


def _source(kind: type) -> str:
    """Return the source of the module that defines a class: attributes that methods set are known from there alone."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return "".join(linecache.getlines(file)) if file else ""
