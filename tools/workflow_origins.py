"""Write into the shipped workflows which pack each node comes from, so that ComfyUI can offer it where it is missing.

    python -m tools.workflow_origins      # after a change of a workflow, of the version, or of the oldest ComfyUI

The front end and ComfyUI-Manager read the properties cnr_id (the name of a pack in the registry) and ver.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

from tools.workflow_files import FILES, nodes_of, read_workflow, workflow_file

ROOT = Path(__file__).resolve().parents[1]
PREFIX = "ACLoRA"  # of the ids of this pack's nodes
KEYS = ("name", "version", "requires-comfyui")  # of pyproject.toml
WITHOUT_ORIGIN = ("MarkdownNote",)  # made by the front end itself


def origins() -> tuple[dict[str, str], dict[str, str]]:
    """Return the properties of this pack's nodes, and those of ComfyUI's own."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = {key: re.search(rf'^{key} = "(?:>=)?([^"]+)"', project, re.MULTILINE) for key in KEYS}
    name, version, oldest = (match.group(1) for match in found.values() if match)
    return {"cnr_id": name, "ver": version}, {"cnr_id": "comfy-core", "ver": oldest}


def with_origins(workflow: dict[str, Any]) -> dict[str, Any]:
    """Return a workflow with the properties of every node."""
    own, core = origins()
    changed = copy.deepcopy(workflow)
    for node in nodes_of(changed):
        if node["type"] not in WITHOUT_ORIGIN:
            origin = own if node["type"].startswith(PREFIX) else core
            node["properties"] = {**node.get("properties", {}), **origin}
    return changed


def main() -> None:
    for name in FILES:
        path = workflow_file(name)
        path.write_text(json.dumps(with_origins(read_workflow(name)), indent=1) + "\n", encoding="utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
