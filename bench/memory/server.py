"""Train in a ComfyUI server with little free GPU memory: a workflow of the pack, and ComfyUI's own training node.

    python -m bench.memory.server --free 8 --host path/to/ComfyUI      # on a CUDA GPU

The server is started as users start it, with its dynamic loader, after another process has occupied the rest of the
memory. The pack's workflow for SDXL runs with a checkpoint of SDXL's true shapes and random weights, which is written
first, and then ComfyUI's own node with the same checkpoint. Both take steps of one image of 1024². Writes
bench/results/memory_server.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp

from launcher.environment import ROOT
from launcher.server import Server
from launcher.workflow import Prompt, to_prompt
from tools.workflow_files import workflow_file

WORKFLOW = workflow_file("sdxl")
TRAINERS = "ACLoRATrain", "TrainLoraNode"
NATIVE: dict[str, dict[str, Any]] = {
    "native": {},
    "native, offloading": {"offloading": True},
    "native, offloading, bypass mode": {"offloading": True, "bypass_mode": True},
}


def our_prompt(definitions: Mapping[str, Any], workflow: Path, steps: int) -> Prompt:
    """Return the workflow in the API form, with so many steps of one image, and drawing cut short."""
    prompt = to_prompt(json.loads(workflow.read_text(encoding="utf-8")), definitions)
    for node in prompt.values():
        if node["class_type"] == "ACLoRATrain":
            node["inputs"] |= {"steps": steps, "batch_size": 1, "max_rank": 16}
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 4
    return prompt


def native_prompt(definitions: Mapping[str, Any], checkpoint: str, steps: int, mode: Mapping[str, Any]) -> Prompt:
    """Return a prompt that trains with ComfyUI's own node, at its defaults but for the mode."""
    known = definitions["TrainLoraNode"]["input"]
    defaults = {
        name: options[1]["default"] for name, options in {**known["required"], **known.get("optional", {})}.items()
        if len(options) > 1 and "default" in options[1]
    }  # fmt: skip
    trainer = defaults | {
        "model": ["1", 0],
        "latents": ["3", 0],
        "positive": ["2", 0],
        "steps": steps,
        "rank": 16,
        "existing_lora": "[None]",
        **mode,
    }
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a house"}},
        "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 1024, "height": 1024, "batch_size": 1}},
        "4": {"class_type": "TrainLoraNode", "inputs": trainer},
        "5": {"class_type": "LossGraphNode", "inputs": {"loss": ["4", 1], "filename_prefix": "loss"}},
    }


async def follow(address: str, prompt: Prompt, patience: float) -> tuple[list[float], str]:
    """Run a prompt; return when each step of its training ended, in seconds, and "" or how it failed."""
    trainer = next(name for name, node in prompt.items() if node["class_type"] in TRAINERS)
    ends: dict[int, float] = {}
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(patience)) as session,
        session.ws_connect(f"{address}/ws?clientId=bench", max_msg_size=0) as events,
    ):
        async with session.post(f"{address}/prompt", json={"prompt": prompt, "client_id": "bench"}) as response:
            if response.status != 200:
                return [], (await response.text())[:500]
        async for event in events:
            if event.type != aiohttp.WSMsgType.TEXT:
                continue
            message = json.loads(event.data)
            kind, data = message["type"], message["data"]
            if kind == "progress" and str(data.get("node")) == trainer:
                ends.setdefault(int(data["value"]), time.perf_counter())
            elif kind == "execution_error":
                error = str(data["exception_message"]).strip().splitlines()
                return list(ends.values()), f"{data['exception_type']}: {error[0] if error else ''}"
            elif kind == "execution_success":
                return list(ends.values()), ""
    return list(ends.values()), "the server closed the connection, as one that has ended"


def run(server: Server, prompt: Prompt, patience: float) -> dict[str, Any]:
    """Run a prompt and return the median time of its later steps in milliseconds, or its failure."""
    try:
        ends, failure = asyncio.run(follow(server.address, prompt, patience))
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        ends, failure = [], f"{type(error).__name__} after {patience:.0f} s"
    gaps = [1000 * (later - earlier) for earlier, later in zip(ends[2:], ends[3:], strict=False)]
    if server.process is not None and server.process.poll() is not None:
        failure = f"the server ended with {server.process.returncode}"
    return {"ms": statistics.median(gaps) if gaps else None, "steps": len(ends), "failure": failure}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.memory.server", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--host", type=Path, default=ROOT / ".runtime" / "ComfyUI")
    parser.add_argument("--free", type=float, default=None, help="GiB; without it nothing is occupied")
    parser.add_argument("--workflow", type=Path, default=WORKFLOW)
    parser.add_argument("--checkpoint", default="sd_xl_base_1.0.safetensors", help="of SDXL, as the workflow names it")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--patience", type=float, default=150.0, help="seconds for each training")
    parser.add_argument("--modes", nargs="*", choices=list(NATIVE), default=list(NATIVE))
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="ComfyUI's options, last")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "memory_server.json")
    args = parser.parse_args()
    file = args.host / "models" / "checkpoints" / args.checkpoint
    if args.workflow == WORKFLOW and not file.is_file():
        command = [sys.executable, "-m", "tools.random_checkpoint", "--host", str(args.host), "sdxl", str(file)]
        subprocess.run(command, check=True, cwd=ROOT)
    link = args.host / "custom_nodes" / "aclora"
    if not link.exists():
        link.symlink_to(ROOT, target_is_directory=True)
    results: dict[str, Any] = {"free_gib": args.free, "date": time.strftime("%Y-%m-%d")}
    log = args.out.with_suffix(".log")
    for name in ["ours", *args.modes]:
        from bench.memory.ballast import left_free

        with left_free(args.free), Server(args.host, Path(sys.executable), args.options, log) as server:
            definitions = json.loads(server.get("/object_info"))
            if name == "ours":
                prompt = our_prompt(definitions, args.workflow, args.steps)
            else:
                prompt = native_prompt(definitions, args.checkpoint, max(6, args.steps // 3), NATIVE[name])
            began = time.perf_counter()
            results[name] = run(server, prompt, args.patience)
            results[name]["seconds"] = time.perf_counter() - began
        said = log.read_text(encoding="utf-8", errors="replace")
        results[name]["said"] = re.findall(r"AC-LoRA: (a step takes.*|[0-9.]+ m?s a step\.|Out of memory.*)", said)
        print(name, json.dumps(results[name]), flush=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
