"""Run a workflow in a ComfyUI server and show its progress.

    python client.py ADDRESS PROMPT.json RESULT.json

ComfyUI's own Python runs this, because ComfyUI brings aiohttp; run.py itself needs only the standard library. The
result file gets {"outputs": the outputs of the nodes} or {"error": {"step": ..., "reason": ...}}.
"""

from __future__ import annotations

import asyncio
import json
import struct
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import aiohttp

if __package__:
    from launcher.console import LiveLine, clock
else:
    from console import LiveLine, clock  # run as a script: its folder is on the path

TEXT_EVENT = 3  # ComfyUI's number for the text that a node shows about itself
BAR = 24  # characters


class RunError(Exception):
    """A workflow that did not run. `step` is the node that failed, or the action."""

    def __init__(self, step: str, reason: str) -> None:
        super().__init__(reason)
        self.step, self.reason = step, reason


def node_title(prompt: dict[str, Any], node_id: str) -> str:
    """Return the title of a node in the workflow, or else its class."""
    node = prompt.get(node_id, {})
    return str(node.get("_meta", {}).get("title") or node.get("class_type") or f"node {node_id}")


class Progress:
    """Print the progress of each node as one line, which is rewritten while the node runs."""

    def __init__(self, prompt: dict[str, Any]) -> None:
        self.prompt, self.line = prompt, LiveLine()
        self.node: str | None = None
        self.done, self.total, self.text = 0.0, 1.0, ""
        self.began, self.tenth = 0.0, 0

    def start(self, node: str | None) -> None:
        """Begin the line of another node; None ends the last one."""
        if node == self.node:
            return
        if self.total > 1 or self.node is not None and time.monotonic() - self.began >= 1:
            self.line.keep(self.describe(ended=True))  # quick nodes leave no line
        self.node, self.done, self.total, self.text = node, 0.0, 1.0, ""
        self.began, self.tenth = time.monotonic(), 0
        if node is not None:
            self.line.show(self.describe())

    def advance(self, node: str, done: float, total: float) -> None:
        """Show that the node has done so much of the total."""
        if node != self.node:
            self.start(node)
        self.done, self.total = done, max(total, 1.0)
        self.redraw()

    def set_text(self, node: str, text: str) -> None:
        """Show a node's text about itself, such as its loss."""
        if node == self.node and text:
            self.text = text.splitlines()[0]
            self.redraw()

    def redraw(self) -> None:
        """Rewrite the line, or print one for each tenth of the work where lines cannot be rewritten."""
        if self.line.live:
            self.line.show(self.describe())
        elif self.total > 1 and int(10 * self.done / self.total) > self.tenth:
            self.tenth = int(10 * self.done / self.total)
            if self.done < self.total:
                self.line.keep(self.describe())

    def describe(self, ended: bool = False) -> str:
        """Return the line: title, bar, count, the node's text, time."""
        parts = [f"  {node_title(self.prompt, self.node or ''):<28}"]
        if self.total > 1:
            filled = BAR if ended else int(BAR * self.done / self.total)
            parts.append(f"[{'#' * filled}{'-' * (BAR - filled)}] {self.done:.0f}/{self.total:.0f}")
        parts += [self.text, f"({clock(time.monotonic() - self.began)})"]
        return " ".join(part for part in parts if part)


def read_text_event(message: bytes) -> tuple[str, str] | None:
    """Return (node id, text) of a binary message, or None for another kind, such as a preview image."""
    if len(message) < 8 or struct.unpack(">I", message[:4])[0] != TEXT_EVENT:
        return None
    length = struct.unpack(">I", message[4:8])[0]
    return message[8 : 8 + length].decode("utf-8", "replace"), message[8 + length :].decode("utf-8", "replace")


def handle(event: dict[str, Any], prompt_id: str, progress: Progress) -> bool:
    """Show one event of the server. Return True if it was the last of this workflow.

    Raises:
        RunError: the workflow failed or was cancelled.
    """
    kind, data = event.get("type"), event.get("data", {})
    if data.get("prompt_id") != prompt_id:
        return False
    if kind == "executing" and data.get("node"):
        progress.start(str(data.get("display_node") or data["node"]))
    elif kind == "progress_state":
        for node in data["nodes"].values():
            if node["state"] == "running":
                progress.advance(str(node["display_node_id"]), node["value"], node["max"])
    elif kind == "execution_error":
        title = node_title(progress.prompt, str(data["node_id"]))
        raise RunError(f"the node '{title}' ({data['node_type']})", str(data["exception_message"]).strip())
    elif kind == "execution_interrupted":
        raise RunError("the workflow", "it was cancelled.")
    return kind == "execution_success"


def explain_refusal(prompt: dict[str, Any], answer: dict[str, Any]) -> RunError:
    """Turn the server's refusal of a prompt into an error with one sentence for each node."""
    reasons = [
        f"{node_title(prompt, node_id)}: {refusal(error)}"
        for node_id, node in (answer.get("node_errors") or {}).items()
        for error in node["errors"]
    ]
    error = answer.get("error")
    whole = error.get("message") if isinstance(error, dict) else error
    return RunError("ComfyUI's check of the workflow", "\n".join(dict.fromkeys(reasons)) or str(whole))


def refusal(error: dict[str, Any]) -> str:
    """Return why ComfyUI refuses an input; where the node itself says it, in its own words."""
    _, dash, sentence = str(error["details"]).partition(" - ")
    if error["type"] == "custom_validation_failed" and dash:
        return sentence
    return f"{error['message']} ({error['details']})"


async def follow(address: str, prompt: dict[str, Any]) -> dict[str, Any]:
    """Queue the prompt, show its progress, and return the outputs of its nodes.

    Raises:
        RunError: the server refused the workflow, or it failed.
    """
    client = uuid.uuid4().hex
    progress = Progress(prompt)
    async with aiohttp.ClientSession() as session:
        async with session.ws_connect(f"{address}/ws?clientId={client}", max_msg_size=0) as socket:
            async with session.post(f"{address}/prompt", json={"prompt": prompt, "client_id": client}) as answer:
                reply = await answer.json()
            if "prompt_id" not in reply:
                raise explain_refusal(prompt, reply)
            async for message in socket:
                if message.type == aiohttp.WSMsgType.BINARY:
                    text_event = read_text_event(message.data)
                    if text_event:
                        progress.set_text(*text_event)
                elif message.type == aiohttp.WSMsgType.TEXT and handle(message.json(), reply["prompt_id"], progress):
                    progress.start(None)
                    break
            else:
                raise RunError("the ComfyUI server", "it stopped in the middle of the workflow.")
        return await finished_outputs(session, f"{address}/history/{reply['prompt_id']}", reply["prompt_id"])


async def finished_outputs(session: aiohttp.ClientSession, url: str, prompt_id: str) -> dict[str, Any]:
    """Return the outputs from the server's history, which is written a moment after the last event."""
    for _ in range(100):
        async with session.get(url) as answer:
            history = await answer.json()
        if prompt_id in history:
            return dict(history[prompt_id]["outputs"])
        await asyncio.sleep(0.1)
    raise RunError("the ComfyUI server", "it kept no history of the workflow.")


def main(address: str, prompt_file: str, result_file: str) -> int:
    """Run the prompt and write the result file. Return 0 on success."""
    prompt = json.loads(Path(prompt_file).read_text(encoding="utf-8"))
    try:
        result: dict[str, Any] = {"outputs": asyncio.run(follow(address, prompt))}
    except RunError as error:
        result = {"error": {"step": error.step, "reason": error.reason}}
    except aiohttp.ClientError as error:
        result = {"error": {"step": "the ComfyUI server", "reason": f"it cannot be reached: {error}"}}
    except KeyboardInterrupt:
        return 130
    Path(result_file).write_text(json.dumps(result, indent=2), encoding="utf-8")
    return 1 if "error" in result else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
