"""How much faster several GPUs train one adapter, and what happens when a process is killed.

    python -m bench.several_gpus --gpus 2                 # on a machine with two CUDA GPUs
    python -m bench.several_gpus --gpus 2 --cpu           # a check with gloo on the CPU and small models
    python -m bench.several_gpus --gpus 2 --parts page    # one part, where time is short; the others stay in the file

Parts: rows (the speed), killed (a process of torchrun is killed), page (the same from ComfyUI's page, and the time to
the first step), copies (of two GPUs: would a model spread over both beat streaming). Models have random weights in
their true shapes (bench/step_time/models.py), which every process makes for itself. A row is one start of torchrun; the
first steps, which compile and capture, are not timed. Writes bench/results/several_gpus_cuda.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench import result_file
from bench.several_gpus import copies, from_page
from launcher.environment import ROOT

PATIENCE = 540.0  # seconds for one row
ENDLESS = 100_000  # steps of the training whose process is killed
# Model, images of one process; and the least speed-up by two GPUs that is wanted.
TABLE = {
    "SDXL 1024², 4 images a GPU": ("sdxl", 4, 1.9),
    "Flux.1 1024², 1 image a GPU": ("flux", 1, 1.9),
}
SPLIT = "SDXL 1024², 4 images in all"  # against the first row's single GPU
SPLIT_WANTED = 1.5
FIRST_STEP_WANTED, KILLED_WANTED = 20, 30  # seconds, from ComfyUI's page
PARTS = ("rows", "killed", "page", "copies")


@dataclass(frozen=True)
class Row:
    """One training."""

    name: str
    case: str  # of bench/step_time/models.py
    gpus: int
    images: int  # of one process in a step
    steps: int = 20  # timed
    images_a_second: float | None = None
    seconds_to_first_step: float | None = None  # from the start of torchrun, the model made in each process
    failure: str = ""


def rows_of(gpus: int) -> list[Row]:
    """Return the rows of the table: each case with one GPU and with all, and one batch split over all."""
    rows = [Row(name, case, count, images) for name, (case, images, _) in TABLE.items() for count in (1, gpus)]
    return [*rows, Row(SPLIT, "sdxl", gpus, max(1, 4 // gpus))]


def command(row: Row, options: argparse.Namespace, folder: Path) -> list[str]:
    """Return the command that starts the processes of a row."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(row.gpus)]
    words += ["-m", "bench.several_gpus", "--worker", str(folder), "--row", json.dumps(asdict(row))]
    return [*words, "--host", str(options.host), *(["--cpu"] if options.cpu else [])]


def measured(row: Row, options: argparse.Namespace) -> Row:
    """Run a row and return it with what was measured."""
    with tempfile.TemporaryDirectory() as scratch:
        began = time.time()
        try:
            run = subprocess.run(command(row, options, Path(scratch)), capture_output=True, text=True, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            return replace(row, failure=f"it did not end within {PATIENCE:.0f} seconds")
    line = next((line for line in run.stdout.splitlines() if line.startswith('{"first"')), "")
    if run.returncode or not line:
        return replace(row, failure=(run.stdout + run.stderr)[-1500:])
    found = json.loads(line)
    rate = row.gpus * row.images * row.steps / found["seconds"]
    return replace(row, images_a_second=rate, seconds_to_first_step=found["first"] - began)


def killed(options: argparse.Namespace) -> dict[str, Any]:
    """Kill the last of the processes in the middle of a training, and return how the others end."""
    row = Row("a process is killed", "tiny" if options.cpu else "sdxl", options.gpus, 1, steps=ENDLESS)
    with tempfile.TemporaryDirectory() as scratch:
        words = command(row, options, Path(scratch))
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            victim, until = Path(scratch, f"{options.gpus - 1}.pid"), time.monotonic() + PATIENCE
            while not victim.is_file() and process.poll() is None and time.monotonic() < until:
                time.sleep(0.1)
            if not victim.is_file():
                process.kill()
                return {"failure": "the training did not begin"}
            os.kill(int(victim.read_text()), signal.SIGKILL)
            began = time.monotonic()
            try:
                output, _ = process.communicate(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                return {"failure": f"the others did not end within {PATIENCE:.0f} seconds"}
            seconds = time.monotonic() - began
    sentences = [line for line in output.splitlines() if "Another process of this training has ended" in line]
    return {"seconds": seconds, "exit_code": process.returncode, "sentence": sentences[0] if sentences else ""}


def work(row: Row, options: argparse.Namespace) -> None:
    """Train as one of the processes of a row."""
    if not options.cpu:  # before CUDA looks for devices
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("LOCAL_RANK", "0")
    signal.signal(signal.SIGTERM, lambda *_: None)  # as run.py train: a process ends by itself, with a sentence
    import torch

    from bench.step_time.aclora import PLAIN
    from bench.step_time.models import build_model, case_named, random_dataset
    from bench.training_session import make_config, training_session
    from launcher.inprocess import load_pack, open_host

    open_host(options.host, cpu=options.cpu)
    pack = load_pack()
    processes = importlib.import_module(f"{pack.__name__}.aclora_core.distributed").join()
    memory = 0 if options.cpu else torch.cuda.get_device_properties(0).total_memory
    case = case_named(row.case, options.cpu, memory)
    latents, captions = random_dataset(case, count=4 * row.gpus * row.images)
    warm_up, times = 3 if options.cpu else 10, list[float]()

    def on_step(progress: Any) -> None:
        times.append(time.time())
        if progress.done == warm_up:
            Path(options.worker, f"{processes.rank}.pid").write_text(str(os.getpid()))

    with torch.inference_mode():
        model = build_model(case)
        with training_session(pack, model, latents, captions) as session:
            settings = {**PLAIN, "batch_size": row.images, "steps": warm_up + row.steps}
            session.train(make_config(pack, **settings), on_step=on_step, processes=processes)
    if processes.is_first:
        print(json.dumps({"first": times[0], "seconds": times[-1] - times[warm_up - 1]}), flush=True)


def table(rows: Sequence[Row]) -> str:
    """Return the table of the issue as Markdown: several GPUs against one."""
    lines = ["| | GPUs | images a second | against one GPU | wanted | to the first step |", "| --- |" + " --- |" * 5]
    single = {row.name: row.images_a_second for row in rows if row.gpus == 1}
    single[SPLIT] = single.get(next(iter(TABLE)))
    wanted = {name: limit for name, (_, _, limit) in TABLE.items()} | {SPLIT: SPLIT_WANTED}
    for row in rows:
        rate, before = row.images_a_second, single.get(row.name)
        times = f"{rate / before:.2f}" if rate and before and row.gpus > 1 else ""
        aim = f"{wanted[row.name]}" if row.gpus > 1 else ""
        first = f"{row.seconds_to_first_step:.0f} s" if row.seconds_to_first_step else ""
        said = f"{rate:.2f}" if rate else f"failed: {row.failure.strip().splitlines()[-1] if row.failure else ''}"
        lines.append(f"| {row.name} | {row.gpus} | {said} | {times} | {aim} | {first} |")
    return "\n".join(lines)


def page_table(found: dict[str, Any]) -> str:
    """Return what was measured from ComfyUI's page as Markdown."""
    if "failure" in found:
        return f"From the page: failed: {found['failure']}"
    first = f"{found['first_step']:.1f} | {FIRST_STEP_WANTED}"
    lines = [
        "| from ComfyUI's page | seconds | wanted |",
        "| --- | --- | --- |",
        f"| start of the processes to the first step, model in memory | {first} |",
        f"| SIGKILL of one process to the end of the training | {found['killed_seconds']:.1f} | {KILLED_WANTED} |",
        f"\nBefore the first step: {found['before']}.\nIt said: {found['sentence']}",
        f"Processes left: {found['left']}. Main memory in GB:",
    ]
    for name, memory in found["memory"].items():
        own = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in memory.items())
        lines.append(f"- {name}: {own}")
    return "\n".join(lines)


def copies_table(found: dict[str, Any]) -> str:
    """Return the rates of copies, and the time of a step that follows from them, as Markdown."""
    lines = [
        f"Peer access: {found['peer_access']}",
        "| weights come from | alone, GB/s | beside products, GB/s | Flux.1 bf16 with 16 GiB free, at least |",
        "| --- | --- | --- | --- |",
    ]
    for source in ("main memory", "other card"):
        row = found[source]
        rates = f"{row['alone'] / 1e9:.1f} | {row['busy'] / 1e9:.1f}"
        lines.append(f"| {source} | {rates} | {row['seconds_a_step']:.2f} s a step |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.several_gpus", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="a check with gloo on the CPU and small models")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--host", type=lambda text: Path(text).absolute(), default=ROOT / ".runtime" / "ComfyUI")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "several_gpus_cuda.json")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(Row(**json.loads(options.row)), options)
        return
    found: dict[str, Any] = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    for part in options.parts:
        if part == "copies" and (options.cpu or options.gpus < 2):
            continue  # there is no second card
        found |= measure(part, options)
        if not options.cpu:  # a check is no result
            import torch

            facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
            found |= {**facts, "date": time.strftime("%Y-%m-%d")}
            result_file.write(options.out, {"rows": [], **found})
    if options.cpu:
        print("\nSmall models on the CPU: a check that everything runs, no measurement.")


def measure(part: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a part, print it, and return it by its name in the file."""
    if part == "rows":
        rows = []
        for row in rows_of(options.gpus):
            rows.append(measured(row, options))
            print(f"{row.name}, {row.gpus} GPUs: {rows[-1].failure or rows[-1].images_a_second}", flush=True)
        print(f"\n{table(rows)}", flush=True)
        return {"rows": [asdict(row) for row in rows]}
    if part == "killed":
        found = killed(options)
        print(f"\nSIGKILL of one process of torchrun: {json.dumps(found)}", flush=True)
    elif part == "page":
        found = from_page.measured(options)
        print(f"\n{page_table(found)}", flush=True)
    else:
        found = copies.measured()
        print(f"\n{copies_table(found)}", flush=True)
    return {part: found}


if __name__ == "__main__":
    main()
