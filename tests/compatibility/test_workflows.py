"""Workflows that version 0.3.0 saved still fit the nodes.

The front end saves the values of a node's widgets as a list without names, so inputs may be added only behind those
that were there, and none may be moved, renamed or taken away.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILES = Path(__file__).parent / "files"
NODES: dict[str, Any] = json.loads((FILES / "nodes.json").read_text(encoding="utf-8"))
WORKFLOWS: dict[str, Any] = json.loads((FILES / "workflows.json").read_text(encoding="utf-8"))
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}
# Defaults that are others since 0.4, as their trainings draw better pictures. A saved workflow holds its own values.
NEW_DEFAULTS = {
    "ACLoRATrain.steps": 1000,
    "ACLoRATrain.max_rank": 32,
    "ACLoRATrain.layers": "all",
    "ACLoRARankOptions.mode": "off",
    "ACLoRARankOptions.restart_every": 80,
    "ACLoRARankOptions.threshold": "dynamic",
    "ACLoRAValidationOptions.held_out": 0.0,
}
FILE_LISTS = {"folder", "lora_name", "masks", "regularisation"}  # their choices are the files on the drive

Input = tuple[str, str, dict[str, Any]]  # id, type, facts


@pytest.fixture(scope="module")
def infos(pack: ModuleType) -> dict[str, Any]:
    """What the nodes tell ComfyUI about themselves, by node id."""

    async def ask() -> list[Any]:
        return list(await (await pack.comfy_entrypoint()).get_node_list())

    found = (node.GET_NODE_INFO_V1() for node in asyncio.run(ask()))
    return {info["name"]: info for info in found}


def inputs_of(groups: dict[str, Any]) -> list[Input]:
    """The inputs in the order of the front end: required ones, then optional ones."""
    found = [item for group in ("required", "optional") for item in groups.get(group, {}).items()]
    return [(name, spec[0], spec[1] if len(spec) > 1 else {}) for name, spec in found]


def widgets_of(inputs: list[Input], values: list[Any]) -> Iterator[tuple[Input, Any]]:
    """The widget of each saved value, as the front end reads them; those that follow from a choice come behind it."""
    values = list(values)
    for each in inputs:
        name, kind, facts = each
        if kind not in WIDGETS or not values:
            continue
        value = values.pop(0)
        yield each, value
        if facts.get("control_after_generate"):
            assert values.pop(0) in ("fixed", "increment", "decrement", "randomize"), name
        if kind == "COMFY_DYNAMICCOMBO_V3":
            (choice,) = (option for option in facts["options"] if option["key"] == value)
            followers = inputs_of(choice["inputs"])
            for follower in followers:
                yield follower, values.pop(0)
    assert not values, f"{len(values)} saved values have no widget"


def check_value(name: str, kind: str, facts: dict[str, Any], value: Any) -> None:
    """A saved value is one that the input takes."""
    if kind == "COMBO" and name not in FILE_LISTS:
        assert value in facts["options"], name
    if kind in ("INT", "FLOAT"):
        assert facts["min"] <= value <= facts["max"], name
    if kind == "BOOLEAN":
        assert isinstance(value, bool), name
    if kind == "STRING":
        assert isinstance(value, str), name


@pytest.mark.parametrize("node_id", NODES)
def test_every_node_has_its_outputs_in_their_order(infos: dict[str, Any], node_id: str) -> None:
    info = infos[node_id]
    outputs = [[name, kind] for name, kind in zip(info["output_name"], info["output"], strict=True)]
    assert outputs[: len(NODES[node_id]["outputs"])] == NODES[node_id]["outputs"]


@pytest.mark.parametrize("node_id", NODES)
def test_every_node_has_its_inputs_in_their_order(infos: dict[str, Any], node_id: str) -> None:
    before, now = NODES[node_id]["inputs"], inputs_of(infos[node_id]["input"])
    assert [(name, kind) for name, kind, _ in now][: len(before)] == [(name, kind) for name, kind, _ in before]


@pytest.mark.parametrize("node_id", NODES)
def test_no_input_became_required(infos: dict[str, Any], node_id: str) -> None:
    """A prompt in the API's form leaves optional inputs out."""
    assert set(infos[node_id]["input"].get("required", {})) <= set(NODES[node_id]["required"])


@pytest.mark.parametrize("node_id", NODES)
def test_inputs_take_what_they_took_and_have_the_same_defaults(infos: dict[str, Any], node_id: str) -> None:
    now = {name: facts for name, _, facts in inputs_of(infos[node_id]["input"])}
    for name, kind, facts in NODES[node_id]["inputs"]:
        check_facts(f"{node_id}.{name}", kind, facts, now[name])


def check_facts(place: str, kind: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """An input takes every value that it took."""
    name = place.rpartition(".")[2]
    if name not in FILE_LISTS:
        assert now.get("default") == NEW_DEFAULTS.get(place, before.get("default")), place
    if kind in ("INT", "FLOAT"):
        assert now["min"] <= before["min"] and before["max"] <= now["max"], place
    if kind == "COMBO" and name not in FILE_LISTS:
        assert set(before["options"]) <= set(now["options"]), place
    if kind == "COMFY_DYNAMICCOMBO_V3":
        check_choices(place, before["options"], now["options"])


def check_choices(place: str, before: list[dict[str, Any]], now: list[dict[str, Any]]) -> None:
    """A choice that brings inputs with it is there, with the inputs that it brought."""
    known = {option["key"]: inputs_of(option["inputs"]) for option in now}
    assert before[0]["key"] == now[0]["key"], f"{place}: the first choice is the default"
    for option in before:
        followers = inputs_of(option["inputs"])
        assert [(name, kind) for name, kind, _ in known[option["key"]]] == [(name, kind) for name, kind, _ in followers]
        for (name, kind, facts), (_, _, facts_now) in zip(followers, known[option["key"]], strict=True):
            check_facts(f"{place}.{option['key']}.{name}", kind, facts, facts_now)


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_saved_nodes_fit(infos: dict[str, Any], workflow: str) -> None:
    for node in WORKFLOWS[workflow]:
        info = infos[node["type"]]
        inputs = inputs_of(info["input"])
        types = {name: kind for name, kind, _ in inputs}
        assert all(types[name] == kind for name, kind in node["inputs"])
        outputs = [[name, kind] for name, kind in zip(info["output_name"], info["output"], strict=True)]
        assert outputs[: len(node["outputs"])] == node["outputs"]
        for (name, kind, facts), value in widgets_of(inputs, node["widgets_values"]):
            check_value(name, kind, facts, value)
