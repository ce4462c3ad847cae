"""Inputs of a workflow's nodes that are set on the command line: node.input=value."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launcher.workflow import Definitions, Prompt, WorkflowError


def apply_settings(prompt: Prompt, settings: Sequence[str], definitions: Definitions) -> None:
    """Set inputs of a prompt's nodes, in place.

    Args:
        prompt: in API form.
        settings: each is node.input=value. The node is named by its id, its title or its class; a value is read as
            JSON where it is that, else as text.
        definitions: of the nodes.

    Raises:
        WorkflowError: one names no node, several, or none of its inputs.
    """
    for setting in settings:
        place, equals, text = setting.partition("=")
        if not equals or "." not in place:
            raise WorkflowError(
                f"'{setting}' is no setting. Write it as node.input=value, such as ACLoRATrain.steps=500."
            )
        node_id, name = _find(prompt, place)
        inputs = prompt[node_id]["inputs"]
        known = {*inputs, *_input_names(definitions.get(prompt[node_id]["class_type"], {}))}
        if name not in known:
            raise WorkflowError(
                f"The node '{place.removesuffix(f'.{name}')}' has no input '{name}'. It has {', '.join(sorted(known))}."
            )
        inputs[name] = _value(text)


def _find(prompt: Prompt, place: str) -> tuple[str, str]:
    """Return the id of the node and the input that node.input names; both may have dots in them."""
    parts = place.split(".")
    for count in range(len(parts) - 1, 0, -1):
        node, name = ".".join(parts[:count]), ".".join(parts[count:])
        found = [node] if node in prompt else [key for key, each in prompt.items() if node in _names(each)]
        if len(found) > 1:
            raise WorkflowError(
                f"Several nodes are called '{node}'. Name the one you mean by its id: {', '.join(found)}."
            )
        if found:
            return found[0], name
    there = ", ".join(f"{key} ({each['class_type']})" for key, each in prompt.items())
    raise WorkflowError(f"No node is called '{'.'.join(parts[:-1])}'. This workflow has {there}.")


def _names(node: Mapping[str, Any]) -> tuple[str | None, str]:
    return node.get("_meta", {}).get("title"), node["class_type"]


def _input_names(definition: Mapping[str, Any]) -> Iterator[str]:
    given = definition.get("input") or {}
    for kind in ("required", "optional"):
        yield from given.get(kind) or ()


def _value(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return {"__value__": value} if isinstance(value, list) else value
