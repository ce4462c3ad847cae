"""Run a workflow with ComfyUI's own executor in this process, without a server or a browser.

    python launcher/headless.py COMFYUI_FOLDER WORKFLOW.json [--messages FILE] [--set node.input=value …] [-- OPTIONS]

The options behind -- are ComfyUI's.
ComfyUI's own Python runs this; `python3 run.py train` finds it and starts it. Under torchrun every process runs it, and
all of them train together: the first runs the workflow, and the others take part in the nodes that share their work.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a script: the folder of the script has modules of ComfyUI's names
    sys.path[0] = str(ROOT)

from launcher.client import TEXT_EVENT, Progress, RunError, explain_refusal, handle, read_text_event  # noqa: E402
from launcher.console import Step, StepError, say  # noqa: E402
from launcher.settings import apply_settings  # noqa: E402
from launcher.workflow import WorkflowError, to_prompt  # noqa: E402
from workers.devices import NoGpuError, take_own_gpu  # noqa: E402
from workers.headless import Headless, Prompt  # noqa: E402

SHARED = ("ACLoRADataset", "ACLoRATrain")  # nodes whose work all processes share
KEEPS = ("ACLoRASave", "SaveLoRA", "SaveLoRANode", "LoraSave")  # nodes that write an adapter
RANK = int(os.environ.get("RANK", "0"))  # among the processes that torchrun has started
CANCELLED = 130  # exit code, as of a program that Ctrl-C ended


class Cancel:
    """The first signal cancels, which keeps the work so far; the second ends the program."""

    def __init__(self) -> None:
        self.asked = False
        self.interrupt: Any = None  # ComfyUI's function, once it is there

    def install(self) -> None:
        """Take over Ctrl-C and SIGTERM, by which clusters announce that they end a job."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Cancel, or raise KeyboardInterrupt."""
        if self.asked or self.interrupt is None:
            raise KeyboardInterrupt
        self.asked = True
        say("\nCancelled: what was learned so far is kept. Once more ends at once.")
        self.interrupt()


class Workflows(Headless):
    """ComfyUI in this process, for the workflows of the command line.

    Args:
        folder: holds ComfyUI's main.py.
        options: of ComfyUI's command line.
        temp: a folder for temporary files; ComfyUI empties it.
        log: file for ComfyUI's messages, which would tear the progress apart; None leaves them in the terminal.
    """

    def __init__(self, folder: Path, options: Sequence[str], temp: Path, log: Path | None) -> None:
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            sys.stderr = log.open("w", encoding="utf-8", errors="replace")
        # In memory, as a server may have the file of the database open.
        own = ["--temp-directory", str(temp), "--database-url", "sqlite:///:memory:"]
        super().__init__(folder, [*options, *own])

    def processes(self) -> Any:
        """Return the processes that train together, of which this one may be the only one.

        Raises:
            WorkflowError: the pack is not among the nodes.
        """
        train = self.nodes.NODE_CLASS_MAPPINGS.get("ACLoRATrain")
        if train is None:
            raise WorkflowError("ComfyUI has not loaded AC-LoRA; its messages tell why.")
        return sys.modules[train.__module__].host.processes()  # those of the pack, as ComfyUI has loaded it

    def definitions(self) -> dict[str, Any]:
        """Return the inputs and the name of every node."""
        titles = self.nodes.NODE_DISPLAY_NAME_MAPPINGS
        kinds = self.nodes.NODE_CLASS_MAPPINGS.items()
        return {kind: {"input": cls.INPUT_TYPES(), "display_name": titles.get(kind, kind)} for kind, cls in kinds}

    def check(self, prompt: Prompt) -> list[str]:
        """Return the ids of the nodes to run for.

        Raises:
            RunError: ComfyUI refuses the prompt, or a part of it.
        """
        answer = asyncio.run(self.execution.validate_prompt(uuid.uuid4().hex, prompt, None))
        valid, error, outputs, node_errors = answer
        if not valid or node_errors:
            raise explain_refusal(prompt, {"error": error, "node_errors": node_errors})
        return list(outputs)

    def adapters(self) -> dict[Path, float]:
        """Return all LoRA files that ComfyUI finds, with the times of their last change."""
        folders = map(Path, self.folders.get_folder_paths("loras"))
        files = [file for folder in folders if folder.is_dir() for file in folder.rglob("*.safetensors")]
        return {file: file.stat().st_mtime for file in files}

    def output_file(self, image: dict[str, Any]) -> Path:
        """Return the path of an image that a node has saved."""
        return Path(self.folders.get_output_directory(), image.get("subfolder", ""), image["filename"])


def show_on(progress: Progress) -> Any:
    """Return what shows the events of ComfyUI in the terminal."""

    def show(event: Any, data: Any, prompt_id: str) -> None:
        if isinstance(event, int):
            found = read_text_event(struct.pack(">I", event) + data) if event == TEXT_EVENT else None
            if found:
                progress.set_text(*found)
        elif isinstance(data, dict):
            handle({"type": event, "data": data}, prompt_id, progress)

    return show


def lead(processes: Any, prompt: Prompt, show: Any) -> Any:
    """Return what has the other processes take part in the nodes that share their work, and shows the events."""

    def on_event(event: Any, data: Any, prompt_id: str) -> None:
        if event == "executing" and prompt.get(data.get("node"), {}).get("class_type") in SHARED:
            processes.told_by_first(data["node"])
        show(event, data, prompt_id)

    return on_event


def follow(comfy: Workflows, processes: Any) -> None:
    """Take part in the nodes that the first process names, until it has ended."""
    prompt = processes.told_by_first(None)
    while (node := processes.told_by_first(None)) is not None:
        comfy.run(prompt, [node], show_on(Progress(prompt)))


def report(comfy: Workflows, prompt: Prompt, outputs: dict[str, Any], before: dict[Path, float]) -> None:
    """Print what was learned, and where adapters and images are."""
    for node_id, shown in outputs.items():
        if prompt.get(node_id, {}).get("class_type") == "ACLoRATrain":
            say("\n" + "\n".join(map(str, shown.get("text", ()))))
    images = [image for shown in outputs.values() for image in shown.get("images", ()) if image.get("type") == "output"]
    say("\nAdapter, with the report of its training in it:")
    written = [file for file, time in comfy.adapters().items() if before.get(file) != time]
    for file in sorted(written):
        say(f"  {file}")
    if not written:
        say("  none was written: connect Save AC-LoRA to the training")
    if images:
        say("Images:")
    for image in images:
        say(f"  {comfy.output_file(image)}")


def read_workflow(file: Path) -> Any:
    """Return what a file holds.

    Raises:
        WorkflowError: it cannot be read.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WorkflowError(f"{file} cannot be read as a workflow: {error}.") from error


def tell(text: str) -> None:
    """Print why a process has ended, also where the first one alone prints the rest."""
    who = f"Process {RANK + 1} of {os.environ['WORLD_SIZE']}. " if RANK else ""
    print(f"\n{who}{text}\n", file=sys.__stdout__, flush=True)


def work(options: argparse.Namespace, comfy_options: Sequence[str], temp: Path, cancel: Cancel) -> int:
    """Run the workflow and print the results. Return the exit code.

    Raises:
        RunError, WorkflowError, StepError: it did not run.
    """
    workflow = read_workflow(options.workflow) if RANK == 0 else {}
    with Step("Starting ComfyUI" + (" on the CPU" if "--cpu" in comfy_options else "")):
        comfy = Workflows(options.comfyui, comfy_options, temp, options.messages)
    cancel.interrupt = comfy.interrupt
    processes = comfy.processes()
    if not processes.is_first:
        follow(comfy, processes)
        return 0  # after a cancel too: the first process tells of it, and torchrun would end it at another code
    definitions = comfy.definitions()
    prompt = to_prompt(workflow, definitions)
    apply_settings(prompt, options.set, definitions)
    wanted = comfy.check(prompt)
    kinds = {node["class_type"] for node in prompt.values()}
    if "ACLoRATrain" in kinds and not kinds & set(KEEPS):
        raise WorkflowError("This workflow keeps no adapter: connect Save AC-LoRA to Train AC-LoRA.")
    messages = f"; ComfyUI's messages: {options.messages}" if options.messages else ""
    say(f"Running {options.workflow} (Ctrl-C cancels and keeps what was learned{messages})")
    if processes.size > 1:
        say(f"{processes.size} processes train together: each takes a batch of its own in every step.")
    before = comfy.adapters()
    progress = Progress(prompt)
    processes.told_by_first(prompt)
    outputs = comfy.run(prompt, wanted, lead(processes, prompt, show_on(progress)))
    progress.start(None)
    processes.told_by_first(None)
    report(comfy, prompt, outputs, before)
    return CANCELLED if cancel.asked else 0


def main(words: Sequence[str]) -> int:
    """Run a workflow. Return 0 on success, 130 after a cancel, else 1."""
    parser = argparse.ArgumentParser(prog="headless.py")
    parser.add_argument("comfyui", type=lambda text: Path(text).absolute())
    parser.add_argument("workflow", type=lambda text: Path(text).absolute())
    parser.add_argument("--messages", type=lambda text: Path(text).absolute())
    parser.add_argument("--set", action="append", default=[], metavar="node.input=value")
    place = list(words).index("--") if "--" in words else len(words)
    ours, theirs = list(words[:place]), list(words[place + 1 :])
    options = parser.parse_args(ours)
    if RANK:  # what the first process prints is enough; the log of each has the rest
        options.messages = options.messages and options.messages.with_stem(f"{options.messages.stem}-{RANK + 1}")
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    cancel = Cancel()
    cancel.install()
    temp = Path(tempfile.mkdtemp(prefix="aclora-"))
    try:
        if "LOCAL_RANK" in os.environ and "--cpu" not in theirs:
            take_own_gpu()
        return work(options, theirs, temp, cancel)
    except (RunError, StepError) as failure:
        tell(f"Failed in {failure.step}:\n\n{failure.reason}")
        return CANCELLED if cancel.asked and failure.step == "the workflow" else 1
    except (WorkflowError, NoGpuError) as failure:
        tell(f"Failed: {failure}")
        return 1
    except KeyboardInterrupt:
        say("\nStopped.")
        return CANCELLED
    except Exception as error:
        if RANK and type(error).__name__ == "OtherProcessError":  # which has said what happened
            return 1
        traceback.print_exc()
        more = f" {options.messages} tells more." if options.messages else ""
        tell(f"Failed: {str(error).removesuffix('.') or type(error).__name__}.{more}")
        return 1
    finally:
        shutil.rmtree(temp, ignore_errors=True)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # threads of ComfyUI would wait for work
