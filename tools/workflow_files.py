"""The shipped workflows: the short name of each, its file, and the range of its node ids.

ComfyUI's template browser shows the file's name as the title, and searches in it alone, best near its start.
The front end sends what a node shows to the node with its id in whatever workflow is open, so no two files share an id.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORKFLOWS = Path(__file__).resolve().parents[1] / "workflows"
FILES = {
    "quickstart": "1 Train a LoRA style - AC-LoRA quickstart",
    "sd15": "2 Train a LoRA style - AC-LoRA SD1.5",
    "sdxl": "3 Train a LoRA style - AC-LoRA SDXL",
    "flux": "4 Train a LoRA style - AC-LoRA Flux",
    "z_image": "5 Train a LoRA style - AC-LoRA Z-Image",
    "resume": "6 Train a LoRA style - AC-LoRA cancel and resume",
    "compare_ranks": "7 Train a LoRA style - AC-LoRA and plain ranks",
    "inspect_and_resize": "8 Inspect and resize a LoRA - AC-LoRA style",
    "evaluate": "9 Evaluate a LoRA style - AC-LoRA",
    "caption_my_folder": "Captions for a LoRA style - AC-LoRA",  # no number: 10 would sort before 2
    "qwen_image": "5b Train a LoRA style - AC-LoRA Qwen-Image",
}
IDS_EACH = 1000  # node ids of a workflow; its place above says which, so new ones come last
FIRST_NODE = {name: IDS_EACH * number for number, name in enumerate(FILES, start=1)}


def workflow_file(name: str, ending: str = ".json") -> Path:
    """Return the path of a workflow by its short name, or of its thumbnail."""
    return WORKFLOWS / f"{FILES[name]}{ending}"


def read_workflow(name: str) -> dict[str, Any]:
    """Read a workflow by its short name."""
    return dict(json.loads(workflow_file(name).read_text(encoding="utf-8")))


def nodes_of(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the nodes of a workflow, those inside its subgraphs too, and not the nodes that stand for a subgraph."""
    subgraphs = workflow.get("definitions", {}).get("subgraphs", [])
    ids = {subgraph["id"] for subgraph in subgraphs}
    return [node for graph in (workflow, *subgraphs) for node in graph["nodes"] if node["type"] not in ids]
