"""Measure a real server's memory over many trainings, with a thousand images and with very large images.

    python -m bench.trouble --host path/to/ComfyUI --runs 20
    python -m bench.trouble --only-runs --checkpoint FILE --resolution 512 --free 3

With the tiny base or a checkpoint, on a CUDA GPU if there is one. A run encodes the dataset (from the cache), trains 10
steps with restarts, saves and samples, with a new seed each time; every third trains the text encoder too, every fifth
draws previews, and every fourth is cancelled. --only-runs skips the measurements with images. With --free another
process occupies the rest of the GPU's memory, so that weights are streamed. Writes bench/results/trouble.json, on a GPU
trouble_cuda.json; with a checkpoint its name is added, and with --free the limit.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from bench.memory.ballast import left_free
from launcher.environment import ROOT, has_cuda
from launcher.host import OWN, link_pack
from launcher.server import COMPARABLE_MEMORY, Server

PROBE = ROOT / "bench" / "trouble" / "probe.py"
SAID = re.compile(r"AC-LoRA: (a step takes.*|Out of memory.*|.*[Pp]review.*|.*slower.*)")
SIDE = 10_000  # pixels of a very large image
EXAMPLE = "example: fluent-emoji-high-contrast"


def prompt(
    folder: str, resolution: int, seed: int, steps: int, text: bool = False, file: str = "", previews: bool = False
) -> dict[str, Any]:
    """Return the workflow: dataset, training, saving, sampling.

    Args:
        text: whether the text encoder is trained too.
        file: name of the checkpoint; "" for the tiny base.
        previews: whether some are drawn.
    """
    images = {"folder": folder, "resolution": resolution, "trigger_word": "", "vae": ["base", 2], "clip": ["base", 1]}
    training = {"steps": steps, "learning_rate": 5e-4, "batch_size": 4, "max_rank": 16, "layers": "all", "seed": seed}
    links = {"model": ["base", 0], "latents": ["data", 0], "conditioning": ["data", 1], "options": ["ranks", 0]}
    ranks = {"mode": "paper", "threshold": "noise floor", "restart_every": 1, "options": ["whole", 0]}
    shown = {"preview_every": 5, "preview_prompts": "a rocket", "preview_guidance": 1.0, "clip": ["base", 1]}
    shown |= {"vae": ["base", 2], "preview_share": 1.0}
    reader = {"clip": ["base", 1], "text_learning": 0.5}
    more: dict[str, Any] = {}
    if text:
        more = {"more": ("ACLoRATextEncoderOptions", reader)}
    elif previews:
        more = {"more": ("ACLoRAPreviewOptions", shown)}
    whole = {"held_out": 0.0, **({"options": ["more", 0]} if more else {})}
    sampling = {"steps": 4, "cfg": 1.0, "seed": 1, "denoise": 1.0, "sampler_name": "euler", "scheduler": "normal"}
    drawn = {"model": ["train", 0], "positive": ["text", 0], "negative": ["text", 0], "latent_image": ["empty", 0]}
    saved = {"lora_model": ["train", 1], "filename": "bench", "precision": "fp16", "overwrite": True}
    empty = "EmptyLatentImage" if file else "EmptySD3LatentImage"
    nodes = {
        "base": ("CheckpointLoaderSimple", {"ckpt_name": file}) if file else ("ACLoRATinyBase", {}),
        "data": ("ACLoRADataset", images),
        "whole": ("ACLoRAValidationOptions", whole),
        "ranks": ("ACLoRARankOptions", ranks),
        "train": ("ACLoRATrain", training | links),
        "save": ("ACLoRASave", saved),
        "text": ("CLIPTextEncode", {"clip": ["train", 4] if text else ["base", 1], "text": "a rocket"}),
        "empty": (empty, {"width": resolution, "height": resolution, "batch_size": 1}),
        "draw": ("KSampler", sampling | drawn),
        "see": ("VAEDecode", {"samples": ["draw", 0], "vae": ["base", 2]}),
        "look": ("PreviewImage", {"images": ["see", 0]}),
        **more,
    }
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


class Run:
    """A server with the probe node pack in it."""

    def __init__(self, server: Server, base: Path) -> None:
        self.server, self.base = server, base
        assert server.process is not None
        self.process = psutil.Process(server.process.pid)

    def do(self, nodes: dict[str, Any], cancel_after: float = 0.0) -> dict[str, Any]:
        """Run a workflow to its end; return the seconds until it was accepted and until it ended, and its peak memory.

        cancel_after: seconds after which to cancel it; 0 for never.
        """
        before, began = self.process.memory_info().rss, time.monotonic()
        completed = {name: self.server.node(node["class_type"], **node["inputs"]) for name, node in nodes.items()}
        prompt_id = self.server.post_json("/prompt", {"prompt": completed})["prompt_id"]
        accepted = time.monotonic() - began
        cancelled = False
        with self._peak_memory() as peak:
            while prompt_id not in (history := self.server.get_json(f"/history/{prompt_id}")):
                if cancel_after and not cancelled and time.monotonic() - began > cancel_after:
                    self.server.post_json("/interrupt", {"prompt_id": prompt_id})
                    cancelled = True
                time.sleep(0.05)
        seconds, found = time.monotonic() - began, history[prompt_id]
        if found["status"]["status_str"] != "success":
            last = found["status"]["messages"][-1]
            if not (cancelled and last[0] == "execution_interrupted"):  # cancelled before the first step
                raise SystemExit(f"The workflow failed: {last}")
        growth = (peak[0] - before) / 1e6
        return {"accepted": accepted, "seconds": seconds, "growth": growth, "outputs": found["outputs"]}

    @contextmanager
    def _peak_memory(self) -> Iterator[list[int]]:
        """Record the server's peak resident memory in this block, in bytes, in a list of one element."""
        peak, stopped = [0], threading.Event()

        def sample() -> None:
            while not stopped.wait(0.02):
                peak[0] = max(peak[0], self.process.memory_info().rss)

        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            yield peak
        finally:
            stopped.set()
            sampler.join()

    def held(self) -> dict[str, Any]:
        """Return the probe's report of the server's memory, in MB."""
        found = dict(self.server.get_json("/held"))
        return found | {"memory": found["memory"] / 1e6, "gpu": found["gpu"] / 1e6}


def many_runs(run: Run, runs: int, resolution: int, file: str, log: Path) -> Iterator[dict[str, Any]]:
    """Yield the probe's report after each training, and what its plan and its troubles were."""
    reported = 0
    for number in range(runs):
        cancelled, text = number % 4 == 3, number % 3 == 1
        previews = number % 5 == 2
        nodes = prompt(EXAMPLE, resolution, number, 400 if cancelled else 10, text, file, previews)
        run.do(nodes, 3.0 if cancelled else 0.0)
        held = run.held()
        network = held["networks"][0]
        row = {name: held[name] for name in ("memory", "gpu", "tensors", "threads")}
        row |= {"files": len(held["files"]), "temporary": len(held["temporary"]), "networks": len(held["networks"])}
        row |= {"hooks": network["hooks"] + network["own_forwards"]}
        said = SAID.findall(log.read_text(encoding="utf-8", errors="replace"))
        row |= {"said": said[reported:]}
        reported = len(said)
        what = [
            word for word, is_so in (("text encoder", text), ("previews", previews), ("cancelled", cancelled)) if is_so
        ]
        print(f"{number + 1:3}", ", ".join(what) or "plain", row, flush=True)
        yield row


def thousand(run: Run, count: int) -> dict[str, Any]:
    """Train on a folder of many small images: the first time, again, and after one caption changed."""
    folder = run.base / "input" / "thousand"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((256, 256), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
        (folder / f"{number}.txt").write_text(f"pattern {number}", encoding="utf-8")
    rows = {which: run.do(prompt("thousand", 128, seed, 20)) for seed, which in enumerate(("first", "same folder"))}
    (folder / "0.txt").write_text("another", encoding="utf-8")
    rows["one caption changed"] = run.do(prompt("thousand", 128, 2, 20))
    found = {which: {name: row[name] for name in ("accepted", "seconds", "growth")} for which, row in rows.items()}
    return found | {"afterwards": {"memory": run.held()["memory"]}}


def huge(run: Run) -> dict[str, Any]:
    """Encode images of 100 megapixels, one at a time."""
    rows = {}
    for kind, mode, suffix in (
        ("RGB", "RGB", "png"),
        ("JPEG", "RGB", "jpg"),
        ("transparent", "RGBA", "png"),
        ("16 bits grey", "I;16", "png"),
    ):
        folder = run.base / "input" / f"huge {kind}"
        folder.mkdir()
        image = Image.new(mode, (SIDE, SIDE), 900 if mode == "I;16" else (9, 120, 60, 99)[: len(mode)])
        image.save(folder / f"huge.{suffix}")
        del image
        nodes = prompt(folder.name, 128, 0, 1)
        nodes = {name: nodes[name] for name in ("base", "data")}
        row = run.do(nodes | {"look": {"class_type": "PreviewAny", "inputs": {"source": ["data", 0]}}})
        rows[kind] = {name: row[name] for name in ("seconds", "growth")}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.trouble", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", type=Path, default=OWN)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--only-runs", action="store_true")
    parser.add_argument("--checkpoint", type=Path, help="instead of the tiny base; only with --only-runs")
    parser.add_argument("--resolution", type=int, default=128, help="of the images in the runs")
    parser.add_argument("--free", type=float, help="GiB of GPU memory that are left free")
    options = parser.parse_args()
    if options.checkpoint and not options.only_runs:
        parser.error("--checkpoint needs --only-runs: the other measurements always use the tiny base.")
    file = options.checkpoint.name if options.checkpoint else ""
    cuda = has_cuda(Path(sys.executable))
    limit = f"{options.free:g}_gib_free" if options.free else ""
    name = "_".join(filter(None, ["trouble", "cuda" if cuda else "", Path(file).stem, limit]))
    target = ROOT / "bench" / "results" / f"{name}.json"
    with tempfile.TemporaryDirectory() as place:
        base = Path(place)
        for part in ("input", "output", "user", "models/loras", "models/checkpoints"):
            (base / part).mkdir(parents=True)
        if options.checkpoint:
            (base / "models" / "checkpoints" / options.checkpoint.name).symlink_to(options.checkpoint.resolve())
        link_pack(base / "custom_nodes")
        shutil.copy(PROBE, base / "custom_nodes" / "probe.py")
        words = ["--base-directory", str(base), "--database-url", "sqlite:///:memory:", "--disable-api-nodes"]
        words += ["--cache-classic"]  # keeps the last prompt's results only; by default as many as memory allows
        words += [] if cuda else ["--cpu"]
        python, log = Path(sys.executable), base / "server.log"
        server = Server(options.host, python, words, log, environment=COMPARABLE_MEMORY)
        with left_free(options.free), server:
            run, rows = Run(server, base), list[dict[str, Any]]()
            for row in many_runs(run, options.runs, options.resolution, file, log):
                rows.append(row)
                save(target, {"runs": rows})
            if not options.only_runs:
                found = {"thousand": thousand(run, options.images), "huge": huge(run)}
                save(target, found)
                for name, parts in found.items():
                    for which, part in parts.items():
                        print(name, which, {key: round(value, 2) for key, value in part.items()}, flush=True)
    print(f"written: {target.relative_to(ROOT)}")


def save(target: Path, found: dict[str, Any]) -> None:
    """Write what was found; other parts of the file stay."""
    before = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    target.write_text(json.dumps(before | found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
