"""Errors on the node that they are about: ComfyUI shows them in a window of its own, above a stack trace.

nodes/web/node_results.js takes them away when the next run begins.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from comfy_api.latest import io

from ...aclora_core.text import error_reason
from .progress import running_node_id, send_text

SIGN = "⚠"  # by which the front end's part knows an error


def tell_errors(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """Have a node show the sentence of an error before it goes on to ComfyUI."""
    execute = node.execute.__func__  # that of the class method
    if hasattr(execute, "__wrapped__"):
        return node

    @functools.wraps(execute)
    def telling(cls: type[io.ComfyNode], *inputs: Any, **named: Any) -> Any:
        try:
            return execute(cls, *inputs, **named)
        except Exception as error:  # a cancel is none
            send_text(f"{SIGN} {error_reason(error)}", running_node_id())
            raise

    node.execute = classmethod(telling)
    return node


def tell_refusal(answer: bool | str) -> bool | str:
    """Show the sentence with which a node's validate_inputs refuses an input on the node; return the answer."""
    if isinstance(answer, str):
        send_text(f"{SIGN} {answer}", running_node_id())
    return answer


def refuse_by(check: Callable[[], object]) -> bool | str:
    """Return True, or the sentence of a ValueError that a check raises, which the node then shows."""
    try:
        check()
    except ValueError as error:
        return tell_refusal(str(error))
    return True
