"""The widgets of a node: which ones it has by its definition, in the order in which their values are saved."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DEFAULTS: dict[str, Any] = {
    "INT": 0,
    "FLOAT": 0.0,
    "STRING": "",
    "BOOLEAN": False,
    "COMBO": None,
    "COLOR": "#ffffff",
    "IMAGECOMPARE": ["", ""],  # what it compares, which the front end shows
}
DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"


@dataclass(frozen=True)
class Widget:
    """One value of a node that is not a link."""

    name: str
    default: Any
    sent: bool = True  # whether the executor gets it; what follows a seed stays in the front end
    has_choices: bool = False  # whether its text may be written {one|another}


def widgets_of(name: str, spec: Sequence[Any], saved: Any, place: int) -> list[Widget]:
    """Return the widgets that an input has, none for a socket.

    Args:
        name: of the input.
        spec: its type and options.
        saved: the node's saved values, as the inputs of a dynamic combo depend on what is chosen.
        place: of the first widget in them.
    """
    options = _options(spec)
    kind = options.get("widgetType") or type_of(spec)
    if options.get("forceInput"):
        return []
    if kind == DYNAMIC_COMBO:
        return _dynamic_combo(name, options, saved, place)
    if kind not in DEFAULTS:
        return []
    default = options.get("default", DEFAULTS[kind])
    if kind == "COMBO" and "default" not in options:
        choices = options.get("options") or (spec[0] if not isinstance(spec[0], str) else [])
        default = choices[0] if choices else None
    widgets = [Widget(name, default, has_choices=bool(options.get("dynamicPrompts")))]
    is_seed = kind == "INT" and name in ("seed", "noise_seed")
    if options.get("control_after_generate", is_seed):
        widgets.append(Widget(f"{name} control_after_generate", "fixed", sent=False))
        if kind == "COMBO":
            widgets.append(Widget(f"{name} control_filter_list", "", sent=False))
    return widgets


def _dynamic_combo(name: str, options: Mapping[str, Any], saved: Any, place: int) -> list[Widget]:
    """Return a combo, and the widgets that come with what is chosen in it."""
    choices = {choice["key"]: choice["inputs"] for choice in options.get("options") or ()}
    default = next(iter(choices), None)
    named = saved if isinstance(saved, Mapping) else {}
    chosen = saved[place] if not named and place < len(saved) else named.get(name, default)
    widgets = [Widget(name, default)]
    for inner, spec in inputs_of(choices.get(chosen) or {}):
        widgets += widgets_of(f"{name}.{inner}", spec, saved, place + len(widgets))
    return widgets


def inputs_of(definition: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[Any]]]:
    """Yield the name and the specification of each input, the required ones first."""
    given = definition.get("input") or definition  # the options of a dynamic combo hold their inputs alike
    for kind in ("required", "optional"):
        yield from (given.get(kind) or {}).items()


def type_of(spec: Sequence[Any]) -> str:
    """Return the type of an input; a list of choices is a combo."""
    return spec[0] if isinstance(spec[0], str) else "COMBO"


def _options(spec: Sequence[Any]) -> Mapping[str, Any]:
    return spec[1] if len(spec) > 1 and isinstance(spec[1], Mapping) else {}


def wrapped(value: Any) -> Any:
    """Return a value as the executor takes it, for which a bare list would be a link."""
    return {"__value__": value} if isinstance(value, list) else value


def value_to_send(widget: Widget, value: Any) -> Any:
    """Return a widget's value as the executor gets it."""
    return wrapped(_with_choices(value) if widget.has_choices and isinstance(value, str) else value)


def _with_choices(text: str) -> str:
    r"""Return a text without comments and with one of each {one|another}; \{, \| and \} stand for themselves."""
    text = re.sub(r"/\*[\s\S]*?\*/|//.*", "", text)
    innermost = re.compile(r"(?<!\\)\{([^{}]*)(?<!\\)\}")
    while found := innermost.search(text):
        text = text[: found.start()] + random.choice(re.split(r"(?<!\\)\|", found[1])) + text[found.end() :]
    return re.sub(r"\\([{}|])", r"\1", text)
