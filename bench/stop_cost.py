"""Measure what early stopping by fit costs: the share of a training's time that goes into measuring its images.

    python -m bench.stop_cost --case sdxl --batches 1 4     # on a CUDA GPU

The model has random weights in its true shapes (bench/step_time/models.py). The GPU is synchronised around every
measurement, so the share is rather too large. Writes bench/results/stop_cost_DEVICE.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench.step_time.aclora import PLAIN
from bench.step_time.clock import release
from bench.step_time.models import CASES, Case, build_model, case_named, random_dataset
from bench.training_session import make_config, training_session
from launcher.environment import ROOT
from launcher.inprocess import load_pack, open_host

_WARM_UP = 80  # steps; by then every kernel is compiled, every graph captured, and images were measured once


def share_of(pack: ModuleType, case: Case, batch: int, steps: int) -> dict[str, float]:
    """Return the seconds of so many steps after the warm-up, those of their measurements, and how many there were."""
    latents, captions = random_dataset(case)
    fit = importlib.import_module(f"{pack.__name__}.aclora_core.training.fit").FitStopping
    measure, marks, measured = fit.measure, list[float](), list[float]()

    def timed(self: Any, *args: Any, **rest: Any) -> None:
        began = now()
        measure(self, *args, **rest)
        measured.append(now() - began)

    def on_step(progress: Any) -> None:
        done = len(progress.losses)
        if done in (_WARM_UP, _WARM_UP + steps):
            marks.append(now())
        if done == _WARM_UP:
            measured.clear()

    settings = {**PLAIN, "batch_size": batch, "steps": _WARM_UP + steps}
    fit.measure = timed
    try:
        with torch.inference_mode(), training_session(pack, build_model(case), latents, captions) as session:
            session.train(make_config(pack, **settings), on_step=on_step)
    finally:
        fit.measure = measure
        release()
    return {"seconds": marks[1] - marks[0], "measuring": sum(measured), "measurements": len(measured)}


def now() -> float:
    """Return the time in seconds, once the GPU has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.stop_cost", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--host", type=Path, default=Path(".runtime/ComfyUI"))
    parser.add_argument("--case", choices=list(CASES), default="sdxl")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=240, help="timed steps")
    parser.add_argument("--miniature", action="store_true", help="a small model of the same kind")
    args = parser.parse_args()
    open_host(args.host)
    pack = load_pack()
    cuda = torch.cuda.is_available()
    memory = torch.cuda.get_device_properties(0).total_memory if cuda else 0
    case = case_named(args.case, args.miniature, memory)
    device = torch.cuda.get_device_name() if cuda else "CPU"
    results: dict[str, object] = {"device": device, "case": case.title, "steps": args.steps, "torch": torch.__version__}
    for batch in args.batches:
        found = share_of(pack, case, batch, args.steps)
        share = found["measuring"] / found["seconds"]
        print(f"{case.title}, batch size {batch}: {found}, {100 * share:.1f} % of the time", flush=True)
        results[f"batch size {batch}"] = found
    out = ROOT / "bench" / "results" / f"stop_cost_{'cuda' if cuda else 'cpu'}.json"
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
