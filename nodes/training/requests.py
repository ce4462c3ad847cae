"""Sample now and save now: what the page asks of the training that runs.

POST /aclora/training/sample and /aclora/training/save, with {"node": "12"} or without; they answer {"message": "…"}.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...aclora_core.adapter import thumbnail_url
from ...aclora_core.text import size_text
from ...aclora_core.training import RequestKind, Requests, Result
from ..adapter.files import numbered_path, output_path
from ..adapter.precision import PRECISIONS
from ..adapter.saving import write_lora

ROUTE = "/aclora/training/{kind}"

_KINDS: dict[str, RequestKind] = {"sample": "sample", "save": "save"}
_PATIENCE = 20.0  # seconds that a request waits for the step at which the training is
_PRECISION = "fp16"  # as Save AC-LoRA's default
_NOTHING_RUNS = "No training is running. While the model is still loading, try again in a moment."
_OTHER_NODE = "Another training is running now. Press the button on its node."
_NO_PROMPTS = "This training has no prompts to draw. Connect AC-LoRA Preview Options before you press Run."
ENDED = "The training ended before that."
_LATER = {
    "sample": "Previews will be drawn after the step that is being computed, and appear on the node.",
    "save": "The LoRA will be saved after the step that is being computed; the node's text will say where.",
}


@dataclass(frozen=True)
class _Running:
    """The training that runs. ComfyUI runs one node at a time."""

    node: str  # its id, without those of the subgraphs around it
    requests: Requests
    draws: bool  # whether it has prompts to draw


_running: _Running | None = None  # set by the thread that trains, read by that of the server


@contextmanager
def answering(node_id: str | None, requests: Requests, draws: bool) -> Iterator[None]:
    """Let the page ask something of a training while the context lasts.

    Args:
        node_id: of its node; None outside a prompt.
        requests: that the training looks at.
        draws: whether it has prompts to draw.
    """
    global _running
    _running = _Running(_own_id(node_id), requests, draws)
    try:
        yield
    finally:
        _running = None
        requests.end(ENDED)


async def answer(kind: str, content: Mapping[str, Any]) -> tuple[int, str]:
    """Ask something of the training that runs, and return the status of HTTP and a sentence for the user.

    Args:
        kind: "sample" or "save".
        content: of the request. node: the id of the training node that is meant, if any.
    """
    running = _running
    if kind not in _KINDS:
        return 404, "There is only sample and save."
    if running is None:
        return 409, _NOTHING_RUNS
    if (node := content.get("node")) is not None and _own_id(str(node)) != running.node:
        return 409, _OTHER_NODE
    if kind == "sample" and not running.draws:
        return 409, _NO_PROMPTS
    future = asyncio.wrap_future(running.requests.ask(_KINDS[kind]))
    done, _ = await asyncio.wait([future], timeout=_PATIENCE)
    return (200, future.result()) if done else (202, _LATER[kind])


def save_now(result: Result, name: str, previews: Sequence[Tensor]) -> str:
    """Save a step that was asked for, or the end, into models/loras/aclora as Save AC-LoRA would; return a sentence.

    Args:
        result: the adapter and its report, which says which step was asked for.
        name: of the training.
        previews: the first becomes the image in the model library.

    Raises:
        ValueError, OSError: it cannot be saved.
    """
    step = result.report.facts.chosen_step
    folder, path = output_path(f"aclora/{name}" if step is None else f"aclora/{name}_step_{step:06}")
    path = numbered_path(path)
    thumbnail = thumbnail_url(previews[0][None]) if previews else ""
    write_lora(result.adapter, path, PRECISIONS[_PRECISION], result.report, thumbnail=thumbnail)
    shown = path.relative_to(folder).as_posix()
    what = "the LoRA" if step is None else f"step {step}"
    return f"Saved {what} as {shown} in models/loras, {size_text(path.stat().st_size)}."


def _own_id(node_id: str | None) -> str:
    """Return a node's id without those of the subgraphs around it: "12" of "3:12"."""
    return (node_id or "").rpartition(":")[2]
