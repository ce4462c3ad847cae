"""Turn a workflow as ComfyUI's front end saves it into the API form, which its executor runs.

The front end does this in the browser. Here it is done from the file and the nodes' definitions: the values of widgets
by their order, links through reroutes, subgraphs, and muted and bypassed nodes. What only the browser can know, such as
the widgets of another pack's scripts, is refused in a sentence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.widgets import Widget, inputs_of, type_of, value_to_send, widgets_of, wrapped

Prompt = dict[str, dict[str, Any]]  # node id -> class_type, inputs, _meta
Definitions = Mapping[str, Mapping[str, Any]]  # class -> {"input": {"required": ..., "optional": ...}, "display_name"}

MUTED, BYPASSED = 2, 4
NOTES = {"Note", "MarkdownNote"}
BUTTONS = {"upload"}  # widgets without a value
SCRIPTED = {"CustomCombo"}  # nodes of ComfyUI whose widgets are made in the browser
INPUTS_OF_SUBGRAPH, OUTPUTS_OF_SUBGRAPH = -10, -20  # ids of the nodes at its border
ADVICE = "Open it in ComfyUI, save it with Workflow > Export (API), and give that file instead."


class WorkflowError(ValueError):
    """A workflow that cannot be read or converted; the message says why and what to do."""


@dataclass
class Graph:
    """The nodes and links of a workflow or of a subgraph inside it."""

    nodes: dict[str, dict[str, Any]]
    links: dict[Any, tuple[Any, int]]  # link id -> node and slot that it comes from
    outputs: dict[int, tuple[Any, int]] = field(default_factory=dict)  # of a subgraph: slot -> where it comes from
    path: tuple[str, ...] = ()  # ids of the subgraph nodes around it
    around: Graph | None = None
    host: dict[str, Any] = field(default_factory=dict)  # the node that stands for it in `around`


def to_prompt(workflow: Mapping[str, Any], definitions: Definitions) -> Prompt:
    """Return the API form of a workflow; one that is in it already is returned as it is.

    Args:
        workflow: what the file holds.
        definitions: of all installed nodes.

    Raises:
        WorkflowError: it is no workflow, or a node in it cannot be converted without the front end.
    """
    if "nodes" not in workflow:
        nodes = list(workflow.values())
        if not nodes or not all(isinstance(node, Mapping) and "class_type" in node for node in nodes):
            raise WorkflowError("This file is no workflow of ComfyUI: it has neither nodes nor class types.")
        return {str(node_id): dict(node) for node_id, node in workflow.items()}
    return _Converter(workflow, definitions).prompt()


class _Converter:
    def __init__(self, workflow: Mapping[str, Any], definitions: Definitions) -> None:
        self.definitions = definitions
        found = (workflow.get("definitions") or {}).get("subgraphs") or ()
        self.subgraphs = {subgraph["id"]: subgraph for subgraph in found}
        self.top = _graph(workflow)
        self.inside: dict[tuple[str, ...], Graph] = {}

    def prompt(self) -> Prompt:
        placed = [(graph, node) for graph, node in self._nodes(self.top) if node["type"] not in NOTES]
        sent = [(graph, node) for graph, node in placed if _runs(node) and not self._is_virtual(node)]
        prompt = {":".join((*graph.path, str(node["id"]))): self._node(graph, node) for graph, node in sent}
        for node in prompt.values():  # links to nodes that are not sent
            links = {name: value for name, value in node["inputs"].items() if isinstance(value, list)}
            for name, (origin, _) in links.items():
                if origin not in prompt:
                    del node["inputs"][name]
        return prompt

    def _nodes(self, graph: Graph) -> Iterator[tuple[Graph, dict[str, Any]]]:
        """Yield all nodes with the graph that they are in, those inside of subgraphs in place of these."""
        for node in graph.nodes.values():
            if node["type"] not in self.subgraphs:
                yield graph, node
            elif graph.around or _runs(node):
                yield from self._nodes(self._subgraph(graph, node))

    def _subgraph(self, graph: Graph, node: dict[str, Any]) -> Graph:
        path = (*graph.path, str(node["id"]))
        if len(path) > 50:
            raise WorkflowError(f"The subgraph of the node {_name(node)} holds itself.")
        if path not in self.inside:
            self.inside[path] = _graph(self.subgraphs[node["type"]], path, graph, node)
        return self.inside[path]

    def _is_virtual(self, node: Mapping[str, Any]) -> bool:
        """Whether a node exists in the front end only."""
        return node["type"] in ("Reroute", "PrimitiveNode") and node["type"] not in self.definitions

    def _node(self, graph: Graph, node: dict[str, Any]) -> dict[str, Any]:
        definition = self._definition(node)
        values = self._values(node)
        inputs = {
            widget.name: value_to_send(widget, values[widget.name]) for widget in self._widgets(node) if widget.sent
        }
        for name, link in _linked(node):
            origin = self._origin(graph, link, _type_of(node, name, definition))
            if isinstance(origin, _Value):
                inputs[name] = origin.value
            elif origin is not None:
                inputs[name] = [":".join(origin[0]), origin[1]]
        title = node.get("title") or definition.get("display_name") or node["type"]
        return {"inputs": inputs, "class_type": node["type"], "_meta": {"title": title}}

    def _definition(self, node: Mapping[str, Any]) -> Mapping[str, Any]:
        kind = str(node["type"])
        if kind in self.definitions:
            return self.definitions[kind]
        if kind.startswith(("workflow>", "workflow/")):
            raise WorkflowError(f"The node {_name(node)} is a group node of an older front end. {ADVICE}")
        raise WorkflowError(
            f"The node {_name(node)} is of the type '{kind}', which this ComfyUI does not have. Install the pack that "
            f"it comes from. If it comes from one that is installed, it exists in the browser only. {ADVICE}"
        )

    def _values(self, node: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of a node's widgets, by name."""
        saved = node.get("widgets_values") or []
        if isinstance(saved, Mapping):
            return {widget.name: saved.get(widget.name, widget.default) for widget in self._widgets(node)}
        widgets = self._widgets(node)
        padded = [*saved, *(widget.default for widget in widgets[len(saved) :])]
        return {widget.name: value for widget, value in zip(widgets, padded, strict=False)}

    def _widgets(self, node: Mapping[str, Any]) -> list[Widget]:
        """Return a node's widgets in the order in which their values are saved.

        Raises:
            WorkflowError: it has one of a kind that only the front end knows.
        """
        definition = self._definition(node)
        saved = node.get("widgets_values") or []
        widgets: list[Widget] = []
        for name, spec in inputs_of(definition):
            widgets += widgets_of(name, spec, saved, len(widgets))
        known = {widget.name for widget in widgets} | BUTTONS
        shown = [slot["widget"]["name"] for slot in node.get("inputs") or () if slot.get("widget")]
        unknown = [name for name in shown if name not in known]
        if unknown or node["type"] in SCRIPTED:
            what = f"The widget '{unknown[0]}' of the node" if unknown else "What is chosen in the node"
            raise WorkflowError(f"{what} {_name(node)} is known to the browser only. {ADVICE}")
        return widgets

    def _origin(self, graph: Graph, link: Any, wanted: str) -> tuple[tuple[str, ...], int] | _Value | None:
        """Return the node and slot, or the value, that a link brings; None where it brings nothing."""
        if link not in graph.links:
            return None
        node_id, slot = graph.links[link]
        if node_id == str(INPUTS_OF_SUBGRAPH):
            return self._from_outside(graph, slot, wanted)
        node = graph.nodes.get(node_id)
        return None if node is None else self._output(graph, node, slot, wanted)

    def _from_outside(self, graph: Graph, slot: int, wanted: str) -> tuple[tuple[str, ...], int] | _Value | None:
        """Return what comes into a subgraph: by a link, or the value of the widget that stands outside for it."""
        assert graph.around is not None
        slots = self.subgraphs[graph.host["type"]]["inputs"]
        outside = {each["name"]: each.get("link") for each in graph.host.get("inputs") or ()}
        if outside.get(slots[slot]["name"]) is not None:
            return self._origin(graph.around, outside[slots[slot]["name"]], wanted)
        sources = [self._promoted(graph, place) for place in range(len(slots))]
        source = sources[slot]
        if source is None:
            return None
        node, name = source
        saved = graph.host.get("widgets_values") or []
        number = sum(each is not None for each in sources[:slot])
        if proxies := graph.host.get("properties", {}).get("proxyWidgets"):  # as older front ends save their order
            ways = (["-1", slots[slot]["name"]], [str(node["id"]), name])
            number = next((place for place, each in enumerate(proxies) if list(each) in ways), len(saved))
        if number < len(saved) and saved[number] is not None:
            return _Value(wrapped(saved[number]))
        return _Value(wrapped(self._values(node)[name]))

    def _promoted(self, graph: Graph, slot: int) -> tuple[dict[str, Any], str] | None:
        """Return the node and the widget inside a subgraph whose value its input shows outside; None for a socket."""
        here = {number for number, origin in graph.links.items() if origin == (str(INPUTS_OF_SUBGRAPH), slot)}
        for node in graph.nodes.values():
            for each in node.get("inputs") or ():
                if each.get("link") not in here or not each.get("widget"):
                    continue
                if node["type"] not in self.subgraphs:
                    return node, each["widget"]["name"]
                names = [own["name"] for own in self.subgraphs[node["type"]]["inputs"]]
                return self._promoted(self._subgraph(graph, node), names.index(each["name"]))
        return None

    def _output(
        self, graph: Graph, node: dict[str, Any], slot: int, wanted: str
    ) -> tuple[tuple[str, ...], int] | _Value | None:
        """Return what an output of a node brings to an input of the wanted type."""
        mode = node.get("mode", 0)
        if mode == MUTED:
            return None
        if mode == BYPASSED:
            return self._passed_by(graph, node, slot, wanted)
        if node["type"] in self.subgraphs:
            inner = self._subgraph(graph, node)
            if slot not in inner.outputs:
                return None
            origin, inner_slot = inner.outputs[slot]
            if origin == str(INPUTS_OF_SUBGRAPH):
                return self._from_outside(inner, inner_slot, wanted)
            return self._output(inner, inner.nodes[origin], inner_slot, wanted)
        if self._is_virtual(node):
            if node["type"] == "PrimitiveNode":
                values = node.get("widgets_values") or []
                return _Value(wrapped(values[0])) if values else None
            link = next((link for _, link in _linked(node)), None)
            return None if link is None else self._origin(graph, link, wanted)
        return (*graph.path, str(node["id"])), slot

    def _passed_by(
        self, graph: Graph, node: dict[str, Any], slot: int, wanted: str
    ) -> tuple[tuple[str, ...], int] | _Value | None:
        """Return what comes through a bypassed node: the input at the same place, or else the first of that type."""
        slots = self._slots(node)
        kinds = [kind for _, kind in slots]
        own = str(node["outputs"][slot]["type"])
        fitting = [place for place, kind in enumerate(kinds) if _fits(kind, own) and _fits(kind, wanted)]
        if wanted in ("*", ""):
            place = slot if slot < len(slots) else 0
        elif slot in fitting:
            place = slot
        else:
            place = next((each for each, kind in enumerate(kinds) if kind == wanted), (fitting or [-1])[0])
        if not slots or place < 0:
            return None
        name, kind = slots[place]
        link = dict(_linked(node)).get(name)
        return None if link is None else self._origin(graph, link, kind)

    def _slots(self, node: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Return the name and the type of each input of a node, in the order in which the front end has them."""
        slots: dict[str, str] = {}
        if node["type"] in self.subgraphs:
            slots = {each["name"]: str(each["type"]) for each in self.subgraphs[node["type"]]["inputs"]}
        elif node["type"] in self.definitions:
            slots = {name: type_of(spec) for name, spec in inputs_of(self.definitions[node["type"]])}
        slots |= {each["name"]: str(each["type"]) for each in node.get("inputs") or ()}
        return list(slots.items())


@dataclass(frozen=True)
class _Value:
    """A value that a link brings from a widget."""

    value: Any


def _graph(
    content: Mapping[str, Any],
    path: tuple[str, ...] = (),
    around: Graph | None = None,
    host: dict[str, Any] | None = None,
) -> Graph:
    links, outputs = {}, {}
    for link in content.get("links") or ():
        number, origin, slot, target, target_slot = _link(link)
        links[number] = (str(origin), slot)
        if target == OUTPUTS_OF_SUBGRAPH:
            outputs[target_slot] = (str(origin), slot)
    nodes = {str(node["id"]): node for node in content["nodes"]}
    return Graph(nodes, links, outputs, path, around, host or {})


def _link(link: Sequence[Any] | Mapping[str, Any]) -> Sequence[Any]:
    if isinstance(link, Mapping):
        return [link[name] for name in ("id", "origin_id", "origin_slot", "target_id", "target_slot")]
    return link[:5]


def _runs(node: Mapping[str, Any]) -> bool:
    return node.get("mode", 0) not in (MUTED, BYPASSED)


def _name(node: Mapping[str, Any]) -> str:
    return f"'{node.get('title') or node['type']}' ({node['id']})"


def _linked(node: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the name and the link of each input that has one."""
    for slot in node.get("inputs") or ():
        if slot.get("link") is not None:
            yield slot["name"], slot["link"]


def _type_of(node: Mapping[str, Any], name: str, definition: Mapping[str, Any]) -> str:
    slots = {slot["name"]: str(slot["type"]) for slot in node.get("inputs") or ()}
    return slots.get(name) or type_of(dict(inputs_of(definition))[name])


def _fits(kind: str, other: str) -> bool:
    """Whether the front end connects two types."""
    if kind in ("*", "", "0") or other in ("*", "", "0"):
        return True
    mine, theirs = ({name.strip().lower() for name in each.split(",")} for each in (kind, other))
    return bool(mine & theirs)
