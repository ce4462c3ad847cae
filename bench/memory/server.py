"""Train in a ComfyUI server with little free GPU memory: this pack's node, and ComfyUI's own beside it.

    python -m bench.memory.server --cases sdxl z_image_fp8 --host path/to/ComfyUI      # on a CUDA GPU
    python -m bench.memory.server --workflow sdxl --free 8                             # the template of the pack
    python -m bench.memory.server --table                                              # what was measured

The server is started for each row as users start it, with its dynamic loader, after another process has occupied the
rest of the memory. Both nodes load the same file of random weights in the model's true shapes, which is written first,
and take steps of one image with rank 16. With --workflow the template runs instead, with a random checkpoint.
Rows of --out that are not measured anew stay. Writes bench/results/memory_server.json.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp

from bench.memory import prompts
from bench.no_search.tables import markdown
from launcher.environment import ROOT
from launcher.server import Server
from launcher.workflow import Prompt
from tools.workflow_files import workflow_file

OURS = "AC-LoRA"
NATIVE: dict[str, dict[str, Any]] = {
    "native": {},
    "native, offloading": {"offloading": True},
    "native, offloading, bypass mode": {"offloading": True, "bypass_mode": True},
}
CHECKPOINTS = {"sdxl": "sd_xl_base_1.0.safetensors", "sd15": "v1-5-pruned-emaonly-fp16.safetensors"}  # of the templates
_WARM_UP = 2  # steps of the native node, which says no time


@dataclass
class Row:
    """One training in a server."""

    case: str
    trainer: str
    free_gib: float | None
    steps: int = 0  # that were taken
    ms: float | None = None  # of a step; ours is what the node says after ten
    each: dict[int, int] = field(default_factory=dict)  # ms by step
    seconds: float = 0.0  # from the prompt to its end, with loading the model
    said: list[str] = field(default_factory=list)
    failure: str = ""


async def follow(address: str, prompt: Prompt, patience: float) -> tuple[dict[int, float], str]:
    """Run a prompt; return when steps of its training ended, in seconds by step, and "" or how it failed."""
    trainer = next(name for name, node in prompt.items() if node["class_type"] in prompts.TRAINERS)
    ends: dict[int, float] = {}
    began = time.perf_counter()
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{address}/ws?clientId=bench", max_msg_size=0) as events,
    ):
        async with session.post(f"{address}/prompt", json={"prompt": prompt, "client_id": "bench"}) as response:
            if response.status != 200:
                return ends, (await response.text())[:500]
        while (left := patience - (time.perf_counter() - began)) > 0:
            try:
                event = await events.receive(timeout=left)
            except TimeoutError:
                break
            if event.type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.CLOSING, aiohttp.WSMsgType.ERROR):
                return ends, "the server closed the connection, as one that has ended"
            message = json.loads(event.data) if event.type == aiohttp.WSMsgType.TEXT else {"type": "", "data": {}}
            kind, data = message["type"], message["data"]
            if kind == "progress" and str(data.get("node")) == trainer:
                ends.setdefault(int(data["value"]), time.perf_counter())  # later stages tell the last step again
            elif kind == "execution_error":
                error = str(data["exception_message"]).strip().splitlines()
                return ends, f"{data['exception_type']}: {error[0] if error else ''}"
            elif kind == "execution_success":
                return ends, ""
    return ends, f"stopped after {patience:.0f} s"


def run(server: Server, prompt: Prompt, row: Row, patience: float) -> None:
    """Run a prompt, and put the times of its steps or its failure into the row."""
    began = time.perf_counter()
    try:
        ends, row.failure = asyncio.run(follow(server.address, prompt, patience))
    except (aiohttp.ClientError, OSError) as error:
        ends, row.failure = {}, f"{type(error).__name__}: {error}"
    row.seconds = time.perf_counter() - began
    if server.process is not None and server.process.poll() is not None:
        row.failure = f"the server ended with {server.process.returncode}"
    row.steps = max(ends, default=0)
    row.each = times_of_steps(ends)


def times_of_steps(ends: Mapping[int, float]) -> dict[int, int]:
    """Return ms by step; ComfyUI does not tell the end of each quick step, so those between two have equal parts.

    ends: seconds by step.
    """
    each = {}
    for earlier, later in itertools.pairwise(sorted(ends)):
        milliseconds = round(1000 * (ends[later] - ends[earlier]) / (later - earlier))
        each |= dict.fromkeys(range(earlier + 1, later + 1), milliseconds)
    return each


def median_step(each: Mapping[int, int], warm_up: int) -> float | None:
    """Return the median time of the steps after the warm-up, in ms; None where there are none."""
    later = [milliseconds for step, milliseconds in each.items() if step > warm_up]
    return statistics.median(later) if later else None


def reported_step(said: Sequence[str]) -> float | None:
    """Return the time of a step that our node says after ten steps, in ms; None where it came to none."""
    found = [re.fullmatch(r"([0-9.]+) (m?s) a step\.", sentence) for sentence in said]
    times = [float(match[1]) * {"ms": 1, "s": 1000}[match[2]] for match in found if match]
    return times[-1] if times else None


def measured(
    host: Path, row: Row, make: Callable[[Mapping[str, Any]], Prompt], options: list[str], patience: float
) -> Row:
    """Start a server with the row's free memory, run the prompt that make returns for its nodes, and return the row."""
    from bench.memory.ballast import left_free

    log = ROOT / ".runtime" / "logs" / f"bench-memory-server-{os.getpid()}.log"  # several may run, a GPU each
    with left_free(row.free_gib), Server(host, Path(sys.executable), options, log) as server:
        run(server, make(json.loads(server.get("/object_info"))), row, patience)
    said = log.read_text(encoding="utf-8", errors="replace")
    row.said = re.findall(r"AC-LoRA: (a step takes.*|[0-9.]+ m?s a step\.|Out of memory.*)", said)
    row.ms = reported_step(row.said) if row.trainer == OURS else median_step(row.each, _WARM_UP)
    outcome = row.failure or f"{row.ms} ms"
    print(f"{row.case}, {row.trainer}, {row.free_gib} GiB free: {outcome}", *row.said, sep="\n    ", flush=True)
    return row


def install_packs(host: Path) -> None:
    """Link this checkout into the custom_nodes of a ComfyUI, and copy the pack of random inputs there."""
    link = host / "custom_nodes" / "aclora"
    if not link.exists():
        link.symlink_to(ROOT, target_is_directory=True)
    shutil.copy(Path(__file__).with_name("random_inputs.py"), host / "custom_nodes" / "aclora_bench_inputs.py")


def write_file(words: list[str]) -> None:
    """Write a file of random weights in a process of its own, which frees all of its GPU memory."""
    subprocess.run([sys.executable, "-m", *words], check=True, cwd=ROOT)


def table(rows: list[Row]) -> str:
    """Return the rows as Markdown."""
    lines = [
        [row.case, f"{row.free_gib:g} GiB" if row.free_gib else "all", row.trainer,
         f"{row.ms:.0f}" if row.ms else "", str(row.steps), f"{row.seconds:.0f}", row.failure]
        for row in rows
    ]  # fmt: skip
    return markdown(["model", "free", "trained by", "ms a step", "steps", "seconds in all", "failure"], lines)


def save(rows: list[Row], out: Path) -> None:
    """Write the rows; others that the file holds stay."""
    new = {(row.case, row.trainer, row.free_gib) for row in rows}
    kept = [row for row in read(out) if (row.case, row.trainer, row.free_gib) not in new]
    results = {"date": time.strftime("%Y-%m-%d"), "rows": [asdict(row) for row in [*kept, *rows]]}
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def read(out: Path) -> list[Row]:
    """Return the rows of a file; none if it does not exist."""
    return [Row(**row) for row in json.loads(out.read_text(encoding="utf-8"))["rows"]] if out.is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.memory.server", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--host", type=Path, default=ROOT / ".runtime" / "ComfyUI")
    parser.add_argument("--cases", nargs="+", default=[], help="of bench/memory/cases.py, at their limits; or tiny")
    parser.add_argument("--workflow", choices=list(CHECKPOINTS), help="run this template")
    parser.add_argument("--free", type=float, nargs="+", help="GiB: these limits instead; 0 occupies nothing")
    parser.add_argument("--modes", nargs="*", choices=list(NATIVE), default=list(NATIVE)[1:2])
    parser.add_argument("--steps", type=int, default=30, help="of ours; the native node takes a third")
    parser.add_argument("--patience", type=float, default=90.0, help="seconds for each training")
    parser.add_argument("--seconds", type=float, default=540.0, help="after these no row begins")
    parser.add_argument("--table", action="store_true", help="print the table of --out and measure nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "memory_server.json")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="ComfyUI's options, last")
    args = parser.parse_args()
    began, rows = time.perf_counter(), list[Row]()
    if not args.table:
        install_packs(args.host)

    def add(case: str, trainer: str, free: float, make: Callable[[Mapping[str, Any]], Prompt]) -> None:
        if time.perf_counter() - began < args.seconds:
            row = Row(case, trainer, free or None)
            rows.append(measured(args.host, row, make, args.options, args.patience))
            save(rows, args.out)

    if args.workflow:
        file = args.host / "models" / "checkpoints" / CHECKPOINTS[args.workflow]
        if not file.is_file():
            write_file(["tools.random_checkpoint", "--host", str(args.host), args.workflow, str(file)])
        template = workflow_file(args.workflow)
        for free in args.free or [8.0]:
            make = partial(prompts.from_workflow, workflow=template, steps=args.steps)
            add(f"template {args.workflow}", OURS, free, make)
    for name in args.cases:
        _add_case(name, args, add)
    print(f"\n{table(read(args.out))}")


def _add_case(name: str, args: argparse.Namespace, add: Callable[..., None]) -> None:
    """Add the rows of a case: for each limit ours, and the native node in each mode."""
    from bench.memory.cases import LIMITS, case_of

    case, file = case_of(name), f"aclora_bench_{name}.safetensors"
    path = args.host / "models" / "diffusion_models" / file
    if not path.is_file():
        write_file(["bench.memory.weights", "--host", str(args.host), name, str(path)])
    for free in args.free or LIMITS[name]:
        add(name, OURS, free, partial(prompts.ours, file=file, case=case, steps=args.steps))
        for mode in args.modes:
            make = partial(prompts.native, file=file, case=case, steps=max(6, args.steps // 3), mode=NATIVE[mode])
            add(name, mode, free, make)


if __name__ == "__main__":
    main()
