"""What a running node shows, and how a cancel reaches it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management
import comfy.utils
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from comfy_execution.utils import get_executing_context
from PIL import Image

_MEASURED_STEPS = 3  # from which the time left is estimated at the earliest


class ProgressBar:
    """A node's progress bar, with a live image and text. A cancel does not raise unless asked for.

    Args:
        total: steps until the bar is full.
        node_id: of the running node; None outside a prompt.
    """

    def __init__(self, total: int, node_id: str | None = None) -> None:
        self.total = total
        self._bar = comfy.utils.ProgressBar(total, node_id=node_id)
        self._node_id = node_id
        self.done = 0
        self._first: tuple[float, int] | None = None  # when the speed began to be measured, and the steps done then

    def show(self, done: int, text: str = "", image: Image.Image | None = None) -> None:
        """Move the bar, and show a text and an image below the node. A cancel stays set and does not raise.

        Args:
            done: steps done of the total.
            text: shown on the node; the last one stays if it is empty.
            image: shown on the node, if any.
        """
        self.done = done
        preview = ("JPEG", image, None) if image else None
        with keep_interrupt():
            self._bar.update_absolute(done, self.total, preview)
        if text:
            send_text(text, self._node_id)

    def advance(self, steps: int) -> None:
        """Advance the bar by some steps. Raises ComfyUI's interrupt on a cancel, which ends the prompt."""
        self.show(self.done + steps)
        raise_if_cancelled()

    def time_left(self, done: int) -> str:
        """Return the time left at the average speed since the first step, as "9:05 left" or "2 h 05 min left".

        The first step is not counted, as much is prepared in it; "" until a few more are done.

        Args:
            done: steps done of the total.
        """
        now = time.monotonic()
        if self._first is None:
            self._first = now, done
        began, first = self._first
        if done - first < _MEASURED_STEPS:
            return ""
        seconds = round((now - began) / (done - first) * (self.total - done))
        minutes = seconds // 60
        return f"{minutes // 60} h {minutes % 60:02} min left" if minutes >= 60 else f"{minutes}:{seconds % 60:02} left"


def send_text(text: str, node_id: str | None) -> None:
    """Show text on the running node; do nothing outside a prompt, where node_id is None, and without a server."""
    if node_id is not None:
        from server import PromptServer  # the web server, which scripts do not start

        instance = getattr(PromptServer, "instance", None)
        if instance is None:
            return
        # Only the page that queued the prompt, as with progress and images, since others may show another workflow with
        # a node of this id; all pages once that one is closed, and for a prompt that came from no page.
        page = instance.client_id if instance.client_id in instance.sockets else None
        # The front end makes a link of [[label|address]], which could come from the name of a file, as half of a
        # character can.
        text = text.replace("[[", "[ [").encode("utf-8", "backslashreplace").decode()
        instance.send_progress_text(text, node_id, page)


def cancelled() -> bool:
    """Return whether the user has pressed Cancel."""
    return bool(comfy.model_management.processing_interrupted())


@contextmanager
def keep_interrupt() -> Iterator[None]:
    """End the block on ComfyUI's interrupt, and set its flag again, so that later checks still see the cancel."""
    try:
        yield
    except comfy.model_management.InterruptProcessingException:
        comfy.model_management.interrupt_current_processing(True)


def clear_interrupt() -> None:
    """Clear the flag of a cancel that was handled, so that the nodes after this one still run."""
    comfy.model_management.interrupt_current_processing(False)


def raise_if_cancelled() -> None:
    """Raise ComfyUI's interrupt if the user has pressed Cancel, which ends the prompt."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def block_output(reason: str | None) -> ExecutionBlocker:
    """Return an output that blocks only the nodes connected to it, which then show the reason, if there is one."""
    return ExecutionBlocker(reason)


def prompt_id() -> str | None:
    """Return the id of the running prompt; None outside one."""
    context = get_executing_context()
    return context.prompt_id if context else None


def running_node_id() -> str | None:
    """Return the id of the running node, also of one that has not asked for it; None outside a prompt."""
    context = get_executing_context()
    return context.node_id if context else None


def hidden_node_id(cls: type[io.ComfyNode]) -> str | None:
    """Return the id of the running node; None outside a prompt."""
    return getattr(getattr(cls, "hidden", None), "unique_id", None)
