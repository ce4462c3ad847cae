"""Variants of a plain workflow that use what ComfyUI's front end can do with nodes and links."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

Workflow = dict[str, Any]


def plain() -> Workflow:
    """Return a workflow that trains and draws, without subgraphs, as ComfyUI's front end saved it."""
    return dict(json.loads(Path(__file__).with_name("plain_workflow.json").read_text(encoding="utf-8")))


def variants() -> dict[str, Workflow]:
    """Return the workflows by what they show."""
    return {
        "muted": _with_mode("KSampler", 2),
        "bypassed training": _with_mode("ACLoRATrain", 4),
        "bypassed sampler": _with_mode("KSampler", 4),
        "primitive": _with_primitive(),
        "reroute": _with_reroute(),
        "choices": _with_comment(),
    }


def _node(workflow: Workflow, kind: str) -> dict[str, Any]:
    return next(node for node in workflow["nodes"] if node["type"] == kind)


def _with_mode(kind: str, mode: int) -> Workflow:
    workflow = plain()
    _node(workflow, kind)["mode"] = mode
    return workflow


def _with_primitive() -> Workflow:
    """The seed of the training comes from a PrimitiveNode: a widget that was converted to an input."""
    workflow = plain()
    train = _node(workflow, "ACLoRATrain")
    train["inputs"].append({"name": "seed", "type": "INT", "widget": {"name": "seed"}, "link": 900})
    primitive = {
        "id": 900,
        "type": "PrimitiveNode",
        "pos": [0, 0],
        "size": [200, 80],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [{"name": "INT", "type": "INT", "links": [900], "widget": {"name": "seed"}}],
        "properties": {"Run widget replace on values": False},
        "widgets_values": [31, "fixed"],
    }
    workflow["nodes"].append(primitive)
    workflow["links"].append([900, 900, 0, train["id"], len(train["inputs"]) - 1, "INT"])
    return workflow


def _with_reroute() -> Workflow:
    """The model goes through a Reroute node."""
    workflow = plain()
    train = _node(workflow, "ACLoRATrain")
    link = next(link for link in workflow["links"] if link[0] == train["inputs"][0]["link"])
    reroute = {
        "id": 901,
        "type": "Reroute",
        "pos": [0, 0],
        "size": [75, 26],
        "flags": {},
        "order": 2,
        "mode": 0,
        "inputs": [{"name": "", "type": "*", "link": link[0]}],
        "outputs": [{"name": "", "type": "MODEL", "links": [901]}],
        "properties": {"showOutputText": False, "horizontal": False},
    }
    workflow["nodes"].append(reroute)
    workflow["links"].append([901, 901, 0, train["id"], 0, "MODEL"])
    link[3], link[4] = 901, 0
    train["inputs"][0]["link"] = 901
    return workflow


def _with_comment() -> Workflow:
    """A prompt with a comment, a choice of one and braces that stand for themselves."""
    workflow = plain()
    _node(workflow, "CLIPTextEncode")["widgets_values"] = ["a {cat} /* or a dog */ with \\{braces\\}"]
    return workflow


def in_subgraph(mode: int = 0, seed: Any = None) -> Workflow:
    """The training inside a subgraph, whose seed is shown outside.

    mode: of the subgraph's node. seed: as set outside; None leaves the inner one.
    """
    workflow = plain()
    train = copy.deepcopy(_node(workflow, "ACLoRATrain")) | {"id": 800}  # ids are unique in the whole file
    identity = "0f4a6f54-63a2-4c57-9a6a-0d1f6a0a0001"
    names = ["model", "latents", "conditioning"]
    inputs = [
        {
            "id": f"0f4a6f54-63a2-4c57-9a6a-00000000000{place}",
            "name": name,
            "type": slot["type"],
            "linkIds": [place + 1],
        }
        for place, (name, slot) in enumerate(zip(names, train["inputs"], strict=True))
    ]
    inputs.append({"id": "0f4a6f54-63a2-4c57-9a6a-000000000009", "name": "seed", "type": "INT", "linkIds": [4]})
    outputs = [
        {
            "id": f"0f4a6f54-63a2-4c57-9a6a-00000000001{place}",
            "name": each["name"],
            "type": each["type"],
            "linkIds": [place + 5],
        }
        for place, each in enumerate(train["outputs"])
    ]
    train["inputs"].append({"name": "seed", "type": "INT", "widget": {"name": "seed"}})
    links = []
    for place, slot in enumerate(train["inputs"]):
        slot["link"] = place + 1
        links.append(_inner_link(place + 1, -10, place, train["id"], place, slot["type"]))
    for place, slot in enumerate(train["outputs"]):
        slot["links"] = [place + 5]
        links.append(_inner_link(place + 5, train["id"], place, -20, place, slot["type"]))
    subgraph = {
        "id": identity,
        "version": 1,
        "state": {"lastGroupId": 0, "lastNodeId": 900, "lastLinkId": 900, "lastRerouteId": 0},
        "revision": 0,
        "config": {},
        "name": "Training",
        "inputNode": {"id": -10, "bounding": [0, 0, 120, 120]},
        "outputNode": {"id": -20, "bounding": [900, 0, 120, 120]},
        "inputs": inputs,
        "outputs": outputs,
        "widgets": [],
        "nodes": [train],
        "groups": [],
        "links": links,
        "extra": {},
    }
    workflow["definitions"] = {"subgraphs": [subgraph]}
    host = _node(workflow, "ACLoRATrain")
    host |= {"type": identity, "mode": mode, "properties": {}, "widgets_values": [] if seed is None else [seed]}
    host["inputs"].append({"name": "seed", "type": "INT", "widget": {"name": "seed"}, "link": None})
    return workflow


def _inner_link(number: int, origin: int, slot: int, target: int, target_slot: int, kind: str) -> dict[str, Any]:
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    return dict(zip(names, (number, origin, slot, target, target_slot, kind), strict=True))
