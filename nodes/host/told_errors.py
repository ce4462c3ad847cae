"""Errors on the node that they are about: ComfyUI shows them in a window of its own, above a stack trace."""

from __future__ import annotations

import functools
from typing import Any

from comfy_api.latest import io

from ...aclora_core.text import error_reason
from .progress import running_node_id, send_text

_told: set[str | None] = set()  # ids of nodes that show an error


def tell_errors(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """Have a node show the sentence of an error before it goes on to ComfyUI, and drop it when the node runs again."""
    execute = node.execute.__func__  # that of the class method
    if hasattr(execute, "__wrapped__"):
        return node

    @functools.wraps(execute)
    def telling(cls: type[io.ComfyNode], *inputs: Any, **named: Any) -> Any:
        node_id = running_node_id()
        if node_id in _told:
            _told.discard(node_id)
            send_text("\u00a0", node_id)  # the front end ignores an empty text
        try:
            return execute(cls, *inputs, **named)
        except Exception as error:  # a cancel is none
            _told.add(node_id)
            send_text(f"⚠ {error_reason(error)}", node_id)
            raise

    node.execute = classmethod(telling)
    return node
