"""A training on several GPUs as ComfyUI's page starts it: the time to its first step, its memory, and a killed process.

A server runs a training on one GPU, after which the model's file is in main memory, and then the same on all, of which
the last process is killed.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from launcher.environment import ROOT
from launcher.host import link_pack
from launcher.server import Server

PATIENCE = 400.0  # seconds for each of the steps below
ENDLESS = 100_000  # steps of the training whose process is killed
EXAMPLE = "example: fluent-emoji-high-contrast"
STARTED = re.compile(r"start of \d+ processes: (.*), the first step after ([\d.]+) s")
MEMORY = ("rss", "pss", "uss")  # of a process: all, with shared pages divided by those who share them, its own alone


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds to the first step, the memory of all processes, and how a killed one ended the training."""
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        link_pack(base / "custom_nodes")
        if not options.cpu:
            _write_checkpoint(options, base / "models" / "checkpoints" / "sdxl.safetensors")
        own = ["--base-directory", scratch, "--database-url", "sqlite:///:memory:", "--disable-api-nodes"]
        own += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", link_pack(base / "custom_nodes")]
        log = ROOT / ".runtime" / "logs" / "bench-several-gpus.log"
        with Server(options.host, Path(sys.executable), [*own, *(["--cpu"] if options.cpu else [])], log) as server:
            _history(server, _submitted(server, options, 1, steps=3))
            run = _submitted(server, options, options.gpus, ENDLESS)
            checkpoints = base / "models" / "aclora_checkpoints" / f"gpus_{options.gpus}"
            _until(lambda: any(checkpoints.glob("first_*")) or _ended(server, run), "a checkpoint")
            found = STARTED.search(log.read_text(encoding="utf-8", errors="replace"))
            if found is None:
                return {"failure": _reason(_history(server, run))}
            memory = _memory(server)
            return {"first_step": float(found[2]), "before": found[1], "memory": memory, **_killed(server, run)}


def _write_checkpoint(options: argparse.Namespace, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tools.random_checkpoint", "--host", str(options.host), "sdxl", str(path)]
    subprocess.run(command, check=True, cwd=ROOT)


def _submitted(server: Server, options: argparse.Namespace, gpus: int, steps: int) -> str:
    """Queue a training and return the id of its run."""
    loader, size = (server.node("ACLoRATinyBase"), 128) if options.cpu else (_checkpoint(server), 1024)
    kept = {"checkpoint_name": f"gpus_{gpus}", "checkpoint_every": 5, "resume": "never"}
    links = {"model": ["1", 0], "latents": ["2", 0], "conditioning": ["2", 1], "options": ["4", 0]}
    prompt = {
        "1": loader,
        "2": server.node("ACLoRADataset", folder=EXAMPLE, resolution=size, vae=["1", 2], clip=["1", 1]),
        "3": server.node("ACLoRASpeedOptions", gpus=str(gpus)),
        "4": server.node("ACLoRACheckpointOptions", **kept, options=["3", 0]),
        "5": server.node("ACLoRATrain", steps=steps, batch_size=1, **links),
        "6": server.node("ACLoRASave", lora_model=["5", 1], filename="bench"),
    }
    return str(server.post_json("/prompt", {"prompt": prompt, "client_id": "bench"})["prompt_id"])


def _checkpoint(server: Server) -> dict[str, Any]:
    return server.node("CheckpointLoaderSimple", ckpt_name="sdxl.safetensors")


def _until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not come within {PATIENCE:.0f} seconds")
        time.sleep(0.2)


def _ended(server: Server, run: str) -> bool:
    return run in server.get_json(f"/history/{run}")


def _history(server: Server, run: str) -> dict[str, Any]:
    _until(lambda: _ended(server, run), "the end of a training")
    return dict(server.get_json(f"/history/{run}")[run])


def _reason(history: dict[str, Any]) -> str:
    """Return the message of the node that failed."""
    errors = [facts for kind, facts in history["status"]["messages"] if kind == "execution_error"]
    return str(errors[0]["exception_message"]).strip() if errors else ""


def _workers(server: Server) -> list[psutil.Process]:
    """Return the processes that train, by rank."""
    assert server.process is not None
    below = psutil.Process(server.process.pid).children(recursive=True)
    found = [process for process in below if any("worker.py" in word for word in process.cmdline())]
    return sorted(found, key=lambda process: int(process.environ()["RANK"]))


def _memory(server: Server) -> dict[str, dict[str, int]]:
    """Return the bytes of main memory of the server and of each process that trains."""
    assert server.process is not None
    named = {"server": psutil.Process(server.process.pid)}
    named |= {f"process {rank + 1}": process for rank, process in enumerate(_workers(server))}
    full = {name: process.memory_full_info() for name, process in named.items()}
    return {name: {kind: getattr(found, kind, 0) for kind in MEMORY} for name, found in full.items()}


def _killed(server: Server, run: str) -> dict[str, Any]:
    """Kill the last process; return how soon the training ended, with which sentence, and how many are left."""
    everyone = _workers(server)
    os.kill(everyone[-1].pid, getattr(signal, "SIGKILL", signal.SIGTERM))
    began = time.monotonic()
    history = _history(server, run)
    seconds = time.monotonic() - began
    left = sum(process.is_running() for process in everyone)
    return {"killed_seconds": seconds, "sentence": _reason(history), "left": left}
