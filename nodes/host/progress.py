"""What a running node shows, and how it is cancelled."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management
import comfy.utils
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from PIL import Image


class Bar:
    """The node's progress bar, with a live picture and a line of text, and the host's cancel."""

    def __init__(self, total: int, node_id: str | None = None) -> None:
        self.total = total
        self._bar = comfy.utils.ProgressBar(total, node_id=node_id)
        self._node_id = node_id
        self.done = 0
        self._started = time.monotonic()

    def show(self, done: int, text: str = "", picture: Image.Image | None = None) -> None:
        """Moves the bar. A cancel is left for cancelled() and raise_if_cancelled() to tell."""
        self.done = done
        preview = ("JPEG", picture, None) if picture else None
        with cancel_kept():
            self._bar.update_absolute(done, self.total, preview)
        if text:
            send_text(text, self._node_id)

    def advance(self, steps: int) -> None:
        """Moves the bar on by some steps; on a cancel the prompt ends here."""
        self.show(self.done + steps)
        raise_if_cancelled()

    def time_left(self, done: int, before: int = 0) -> str:
        """Minutes and seconds that the rest takes at the pace so far. before: steps that an earlier run had done."""
        seconds = round((time.monotonic() - self._started) / max(1, done - before) * (self.total - done))
        return f"{seconds // 60}:{seconds % 60:02} left"


def send_text(text: str, node_id: str | None) -> None:
    """Shows text on the node that runs; outside a prompt, in a script or test, there is none."""
    if node_id is not None:
        from server import PromptServer  # the web server, which scripts do not start

        PromptServer.instance.send_progress_text(text, node_id)


def cancelled() -> bool:
    """Whether the user has asked to stop."""
    return bool(comfy.model_management.processing_interrupted())


@contextmanager
def cancel_kept() -> Iterator[None]:
    """Ends what is in here on a cancel, which the host would forget as it raises it, and keeps it in mind."""
    try:
        yield
    except comfy.model_management.InterruptProcessingException:
        comfy.model_management.interrupt_current_processing(True)


def accept_cancel() -> None:
    """Takes the user's stop as done, so that the nodes behind this one still run."""
    comfy.model_management.interrupt_current_processing(False)


def raise_if_cancelled() -> None:
    """Stops the whole prompt where the user has asked for it."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def blocked(reason: str) -> ExecutionBlocker:
    """An output that stops only the nodes behind it, with a sentence."""
    return ExecutionBlocker(reason)


def hidden_node_id(cls: type[io.ComfyNode]) -> str | None:
    """The id of the node that runs; None outside a prompt."""
    return getattr(getattr(cls, "hidden", None), "unique_id", None)
