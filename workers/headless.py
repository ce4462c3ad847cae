"""ComfyUI in this process, with its executor and its nodes, without a server."""

from __future__ import annotations

import gc
import importlib
import os
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Prompt = dict[str, dict[str, Any]]  # in API form: node id -> class_type, inputs


class Headless:
    """ComfyUI in this process. There can be one only.

    Args:
        folder: holds ComfyUI's main.py.
        options: of ComfyUI's command line.
        changes: attributes of ComfyUI's parsed arguments, which replace what the options say.
    """

    def __init__(self, folder: Path, options: Sequence[str] = (), changes: Mapping[str, Any] | None = None) -> None:
        gc.disable()  # of some five thousand modules nothing can be freed, and a sixth of the start would look for it
        sys.path.insert(0, str(folder))  # first, since the pack too has a module `nodes`
        sys.argv = [str(folder / "main.py"), *options]
        os.chdir(folder)
        importlib.import_module("comfy.options").enable_args_parsing()
        vars(importlib.import_module("comfy.cli_args").args).update(changes or {})
        self._streams = sys.stdout, sys.stderr  # ComfyUI takes over their buffers, which would close with them
        main = importlib.import_module("main")
        # As a program main imports this itself, and needs it where its allocator is used, as in a child of the server.
        main.cuda_malloc = importlib.import_module("cuda_malloc")  # type: ignore[attr-defined]
        self._loop, self._server, _ = main.start_comfyui()
        gc.freeze()
        gc.enable()
        self.execution, self.nodes = importlib.import_module("execution"), importlib.import_module("nodes")
        self.folders = importlib.import_module("folder_paths")
        caches = {"lru": 0, "ram": 0, "ram_inactive": 0}
        self._executor = self.execution.PromptExecutor(self._server, self.execution.CacheType.CLASSIC, caches)

    def interrupt(self) -> None:
        """Ask the running node to end."""
        self.nodes.interrupt_processing(True)

    def run(self, prompt: Prompt, wanted: Sequence[str], progress: Any) -> dict[str, Any]:
        """Run some nodes, and all that they need, and return what the nodes show.

        Args:
            prompt: in API form.
            wanted: ids of nodes.
            progress: called with each event of ComfyUI: its type, its data, and the id of this run. The first error
                that it raises is raised after the run, as ComfyUI goes on telling what it knows.
        """
        prompt_id = uuid.uuid4().hex
        failures: list[Exception] = []

        def on_event(event: Any, data: Any, *_: Any) -> None:
            try:
                progress(event, data, prompt_id)
            except Exception as error:
                failures.append(error)

        self._server.send_sync = on_event
        self._executor.execute(prompt, prompt_id, {"client_id": "headless"}, list(wanted))
        if failures:
            raise failures[0]
        return dict(self._executor.history_result["outputs"])
