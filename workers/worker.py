"""One of the processes that train together on the GPUs of this machine. ComfyUI's server has them started by torchrun.

    python worker.py        in the environment of torchrun, with ACLORA_WORKERS: where the server listens, and the job

It starts ComfyUI without a server, and the pack in it does the rest (nodes/training/several/part.py).
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # the folder of this script is no place to import from

from workers.devices import take_own_gpu  # noqa: E402
from workers.headless import Headless  # noqa: E402
from workers.line import Line  # noqa: E402


def pack_module(comfy: Headless, name: str) -> Any:
    """Return a module of the pack, as ComfyUI has loaded it.

    Raises:
        RuntimeError: ComfyUI has not loaded the pack.
    """
    train = comfy.nodes.NODE_CLASS_MAPPINGS.get("ACLoRATrain")
    if train is None:
        raise RuntimeError("ComfyUI has not loaded AC-LoRA in a process beside the server.")
    return importlib.import_module(f"{train.__module__.removesuffix('.nodes.training.node')}.{name}")


def work(job: Path, given: dict[str, Any], line: Line) -> None:
    """Start ComfyUI and take part in the training.

    job: folder with `arguments`, those of the server's ComfyUI.
    """
    if given["gpus"]:
        take_own_gpu()
    sys.path.insert(0, given["comfyui"])  # the arguments have types of ComfyUI
    arguments = pickle.loads((job / "arguments").read_bytes())
    comfy = Headless(Path(given["comfyui"]), changes={**arguments, "temp_directory": str(job / f"temp-{line.rank}")})
    pack_module(comfy, "nodes.training.several.part").take_part(comfy, job, line)


def main() -> None:
    """Work, and tell the server of a failure."""
    given = json.loads(os.environ["ACLORA_WORKERS"])
    line = Line(given["address"], bytes.fromhex(given["key"]), int(os.environ["RANK"]))
    try:
        work(Path(given["job"]), given, line)
    except Exception as error:
        traceback.print_exc()
        line.send("failed", str(error) or type(error).__name__, type(error).__name__)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)  # threads of ComfyUI would wait for work; the server has been told of a failure


if __name__ == "__main__":
    main()
