"""Attributes of ComfyUI's modules, replaced for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced_attribute(owner: Any, name: str, change: Callable[[Any], Any]) -> Iterator[None]:
    """Set an attribute to change(its value), and restore it on exit. Do nothing if there is no such attribute.

    Args:
        owner: a module or an object.
        name: of its attribute.
        change: from the value to its replacement.
    """
    own = getattr(owner, name, None)
    try:
        if own is not None:
            setattr(owner, name, change(own))
        yield
    finally:
        if own is not None:
            setattr(owner, name, own)
